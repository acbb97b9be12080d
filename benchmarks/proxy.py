"""Calls per second through the proxy, and the latency it adds, at 1, 16 and 64 episodes.

    python benchmarks/proxy.py [--seconds 3] [--rounds 3] [--write]

Each episode has a key of its own and makes one call after the other, asking a 300-byte
question as the openai SDK would send it and getting 32 tokens. The engine is a fake that
answers at once, or after 100 ms; "added" is p50 above these. The server has one core, the
callers (and the endpoint behind LiteLLM) another one, where the machine has two.

Compares: "http", astuner's proxy, which renders, samples from a FakeEngine (one byte a token),
parses and records every call; "relay", the same proxy in front of an HTTP endpoint that is a
fake; "LiteLLM", LiteLLM's proxy in front of the same endpoint with one worker, no database, no
logging, in an environment of its own; "in process", the app through its own transport, on one
core with the caller; and so with the openai SDK, whose own work then counts. Medians of the
rounds, in which all take turns.

Does not show: streaming, long conversations (rendering then costs more), several workers, or
what LiteLLM is for (many providers, keys, budgets).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from proxy_sides import QUESTION, TEXT, Ask, load
from record import Report
from waiting import INSTALL, build

from astuner.chat.protocol import Message, ParsedReply, Tool
from astuner.engine.fake import FakeEngine
from astuner.model_tuner import RelayServer, Session, SessionSampling, SessionSpec, TunerServer
from astuner.model_tuner.server import ProxyServer
from astuner.types import TokenIds

REPLY = [*TEXT.encode(), 257]
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, CALLER_CORE = {CORES[0]}, {CORES[-1]}
SIDES = Path(__file__).with_name("proxy_sides.py")
START_SECONDS = 240.0
LITELLM = "LiteLLM"
Result = dict[str, float]


class Bytes:
    """A codec that costs next to nothing."""

    stop_token_ids = (257,)
    supports_tools = False

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> TokenIds:
        return self.encode("".join(m["content"] for m in messages))

    def extend(self, *_: Any, **__: Any) -> None:
        return None

    def parse(self, completion_ids: TokenIds, *_: Any, **__: Any) -> ParsedReply:
        return ParsedReply(self.decode(completion_ids), None, ())

    def encode(self, text: str) -> TokenIds:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | TokenIds, *, skip_special: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


# ---------------------------------------------------------------- load


def from_outside(endpoints: Sequence[tuple[str, str]], seconds: float, engine_ms: float) -> Result:
    """By callers in a process of their own; endpoints are (base_url, key)."""
    job = {"endpoints": endpoints, "seconds": seconds, "engine_ms": engine_ms}
    child = subprocess.run(
        [sys.executable, str(SIDES), "load"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=seconds * 10 + 300,
        preexec_fn=lambda: os.sched_setaffinity(0, CALLER_CORE),
    )
    return json.loads(child.stdout)


def over_http(
    server: ProxyServer, sessions: list[Session], seconds: float, engine_ms: float
) -> Result:
    endpoints = [session.tuner.as_oai_baseurl_apikey() for session in sessions]
    return from_outside([(e.base_url, e.api_key) for e in endpoints], seconds, engine_ms)


def in_process(
    server: ProxyServer, sessions: list[Session], seconds: float, engine_ms: float
) -> Result:
    import httpx

    from astuner.model_tuner.in_process import InProcessTransport

    transport = InProcessTransport(server.app)
    body = json.dumps({"messages": QUESTION, "model": "m"}).encode()

    def ask_as(key: str) -> Ask:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

        async def ask() -> None:
            request = httpx.Request(
                "POST", "http://x/v1/chat/completions", headers=headers, content=body
            )
            response = await transport.handle_async_request(request)
            await response.aread()

        return ask

    keys = [session.agent("default", "default").api_key for session in sessions]
    return asyncio.run(load([ask_as(key) for key in keys], seconds, engine_ms))


def openai_sdk(
    server: ProxyServer, sessions: list[Session], seconds: float, engine_ms: float
) -> Result:
    def ask_with(session: Session) -> Ask:
        client = session.tuner.as_raw_openai_sdk_client()

        async def ask() -> None:
            await client.chat.completions.create(model="m", messages=QUESTION)

        return ask

    return asyncio.run(load([ask_with(session) for session in sessions], seconds, engine_ms))


# ---------------------------------------------------------------- ways

WAYS = {"http": over_http, "in process": in_process, "in process, openai SDK": openai_sdk}


def ours(way: str, episodes: int, engine_ms: float, seconds: float) -> Result:
    engine = FakeEngine(
        [REPLY], chunk_tokens=len(REPLY), seconds_per_token=engine_ms / 1000 / len(REPLY)
    )
    return with_sessions(TunerServer(engine, Bytes()), WAYS[way], episodes, engine_ms, seconds)


def relayed(base_url: str, episodes: int, engine_ms: float, seconds: float) -> Result:
    server = RelayServer(base_url, "m", "none")
    return with_sessions(server, over_http, episodes, engine_ms, seconds)


def with_sessions(
    server: ProxyServer,
    way: Callable[[ProxyServer, list[Session], float, float], Result],
    episodes: int,
    engine_ms: float,
    seconds: float,
) -> Result:
    with server:
        spec = SessionSampling(max_tokens=64)
        sessions = [
            server.open_session(SessionSpec(f"e{i}", seed=i, sampling=spec))
            for i in range(episodes)
        ]
        result = way(server, sessions, seconds, engine_ms)
        recorded = sum(len(session.close()) for session in sessions)
        assert recorded >= result["calls"] * seconds * 0.9, "calls went unrecorded"
    return result


@contextmanager
def fake_endpoint(engine_ms: float) -> Generator[str]:
    """The base_url of one in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, str(SIDES), "fake", str(engine_ms)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, CALLER_CORE),
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def litellm(upstream: str, key: str) -> Generator[str]:
    """The base_url of LiteLLM's proxy with one worker, in front of the endpoint. Raises
    RuntimeError if it does not start."""
    settings = {
        "model_list": [
            {
                "model_name": "m",
                "litellm_params": {"model": "openai/m", "api_base": upstream, "api_key": "none"},
            }
        ],
        "litellm_settings": {"num_retries": 0, "turn_off_message_logging": True},
    }
    port = _free_port()
    folder = Path(tempfile.mkdtemp())
    (folder / "config.yaml").write_text(json.dumps(settings))  # which is YAML too
    command = [*INSTALL, "litellm", "--", "litellm", "--config", str(folder / "config.yaml")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    variables = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"}
    variables["LITELLM_MASTER_KEY"] = key
    log = folder / "log"
    process = subprocess.Popen(
        command,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=os.environ | variables,
        preexec_fn=lambda: os.sched_setaffinity(0, SERVER_CORE),
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health/liveliness", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(url: str, process: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"LiteLLM did not start:\n{log.read_text()[-4000:]}") from None
            time.sleep(0.5)


# ---------------------------------------------------------------- report


def measure(engine_ms: float, args: argparse.Namespace, report: Report) -> None:
    table = f"The engine takes {engine_ms:g} ms"
    with ExitStack() as stack:
        upstream = stack.enter_context(fake_endpoint(engine_ms))
        ways: dict[str, Callable[[int], Result]] = {
            way: lambda n, way=way: ours(way, n, engine_ms, args.seconds) for way in WAYS
        }
        ways["relay"] = lambda n: relayed(upstream, n, engine_ms, args.seconds)
        key = f"sk-{secrets.token_hex(16)}"
        try:
            other = stack.enter_context(litellm(upstream, key))
            ways[LITELLM] = lambda n: from_outside([(other, key)] * n, args.seconds, engine_ms)
        except RuntimeError as error:
            print(error, file=sys.stderr)
        for episodes in args.episodes:
            results: dict[str, list[Result]] = {way: [] for way in ways}
            for _ in range(args.rounds):
                for way, run in ways.items():
                    results[way].append(run(episodes))
            for way, found in results.items():
                middle = {k: median(r[k] for r in found) for k in ("calls", "p50", "p99")}
                report.row(
                    table,
                    {
                        "way": way,
                        "episodes": episodes,
                        "calls/s": middle["calls"],
                        "p50 ms": middle["p50"],
                        "p99 ms": middle["p99"],
                        "added ms": middle["p50"] - engine_ms,
                    },
                )
    if engine_ms == 0:
        conclude(table, max(args.episodes), min(args.episodes), report)


def conclude(table: str, most: int, least: int, report: Report) -> None:
    found = {(row["way"], row["episodes"]): row for row in report.rows(table)}

    def of(way: str, episodes: int, column: str) -> float:
        return float(found[way, episodes][column] or 0)

    rate = of("http", most, "calls/s")
    report.figure(table, f"proxy over HTTP, calls/s at {most} episodes", rate, "at least 1,500")
    added = of("http", least, "added ms")
    report.figure(table, "proxy over HTTP, ms added at p50 for one caller", added, "under 2")
    added = of("in process", least, "added ms")
    report.figure(table, "proxy in process, ms added at p50 for one caller", added, "under 0.5")
    if (LITELLM, most) in found:
        ratio = rate / of(LITELLM, most, "calls/s")
        report.figure(table, "proxy, times LiteLLM's calls/s", ratio)
        added = of(LITELLM, least, "added ms")
        report.figure(table, "LiteLLM, ms added at p50 for one caller", added)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    build("litellm")
    os.sched_setaffinity(0, SERVER_CORE)
    report = Report("proxy", __doc__, write=args.write)
    for engine_ms in (0.0, 100.0):
        measure(engine_ms, args, report)


if __name__ == "__main__":
    main()
