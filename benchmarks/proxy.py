"""Calls per second through the proxy, and the latency it adds, at 1, 16 and 64 episodes.

Each episode has a key of its own and makes one call after the other, asking a
300-byte question and getting 32 tokens. The engine is a FakeEngine and the codec
one byte a token, so what is measured is the proxy. "http" is a bare client in a
process of its own on kept-alive connections; "in process" calls the same app
through its transport, bare and with the openai SDK (whose own work then counts).

Two tables: with an engine that answers at once (calls/s is the proxy's ceiling;
latency is mostly waiting in line), and with one that takes 100 ms a call (added is
the latency above those 100 ms).

    python benchmarks/proxy.py [--seconds 3] [--markdown]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from astuner.chat.protocol import Message, ParsedReply, Tool
from astuner.engine.fake import FakeEngine
from astuner.model_tuner import Session, SessionSampling, SessionSpec, TunerServer
from astuner.types import TokenIds

EPISODES = (1, 16, 64)
REPLY = [*b"The answer is seven, as always.", 257]
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "why? " * 60}]}).encode()
Ask = Callable[[], Awaitable[None]]


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


async def load(asks: Sequence[Ask], seconds: float, engine_ms: float) -> dict[str, float]:
    """Let every `ask` run again and again for so long; latencies in ms. Episodes start
    spread over one call of the engine, or they would all answer in the same instant."""
    await asyncio.gather(*(ask() for ask in asks))
    end = time.perf_counter() + seconds
    latencies: list[float] = []

    async def episode(index: int, ask: Ask) -> None:
        await asyncio.sleep(engine_ms / 1000 * index / len(asks))
        while (start := time.perf_counter()) < end:
            await ask()
            latencies.append(time.perf_counter() - start)

    started = time.perf_counter()
    await asyncio.gather(*(episode(i, ask) for i, ask in enumerate(asks)))
    elapsed = time.perf_counter() - started
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return {"calls": len(latencies) / elapsed, "p50": float(p50), "p99": float(p99)}


async def bare_http(host: str, port: int, key: str) -> Ask:
    """POST on one kept-alive connection, reading as little as HTTP allows."""
    reader, writer = await asyncio.open_connection(host, port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    )

    async def ask() -> None:
        writer.write(head.encode() + BODY)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode())
        length = next(x for x in answer.lower().split(b"\r\n") if x.startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))

    return ask


async def load_http(job: dict[str, Any]) -> dict[str, float]:
    """What the child process does."""
    asks = [await bare_http(job["host"], job["port"], key) for key in job["keys"]]
    return await load(asks, job["seconds"], job["engine_ms"])


def http(
    server: TunerServer, sessions: list[Session], seconds: float, engine_ms: float
) -> dict[str, float]:
    endpoints = [session.tuner.as_oai_baseurl_apikey() for session in sessions]
    port = int(server.base_url.split(":")[2].split("/")[0])
    keys = [endpoint.api_key for endpoint in endpoints]
    job = {"host": "127.0.0.1", "port": port, "keys": keys}
    job |= {"seconds": seconds, "engine_ms": engine_ms}
    child = subprocess.run(
        [sys.executable, __file__, "--load"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds * 4 + 60,
    )
    return json.loads(child.stdout)


def in_process(
    server: TunerServer, sessions: list[Session], seconds: float, engine_ms: float
) -> dict[str, float]:
    import httpx

    from astuner.model_tuner.in_process import InProcessTransport

    transport = InProcessTransport(server.app)

    def ask_as(key: str) -> Ask:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

        async def ask() -> None:
            request = httpx.Request(
                "POST", "http://x/v1/chat/completions", headers=headers, content=BODY
            )
            response = await transport.handle_async_request(request)
            await response.aread()

        return ask

    keys = [session.agent("default", "default").api_key for session in sessions]
    return asyncio.run(load([ask_as(key) for key in keys], seconds, engine_ms))


def openai_sdk(
    server: TunerServer, sessions: list[Session], seconds: float, engine_ms: float
) -> dict[str, float]:
    messages = json.loads(BODY)["messages"]

    def ask_with(session: Session) -> Ask:
        client = session.tuner.as_raw_openai_sdk_client()

        async def ask() -> None:
            await client.chat.completions.create(model="m", messages=messages)

        return ask

    return asyncio.run(load([ask_with(session) for session in sessions], seconds, engine_ms))


# ---------------------------------------------------------------- report

WAYS = {"http": http, "in process": in_process, "in process, openai SDK": openai_sdk}


def measure(way: str, episodes: int, engine_ms: float, seconds: float) -> dict[str, float]:
    engine = FakeEngine(
        [REPLY], chunk_tokens=len(REPLY), seconds_per_token=engine_ms / 1000 / len(REPLY)
    )
    with TunerServer(engine, Bytes()) as server:
        spec = SessionSampling(max_tokens=64)
        sessions = [
            server.open_session(SessionSpec(f"e{i}", seed=i, sampling=spec))
            for i in range(episodes)
        ]
        result = WAYS[way](server, sessions, seconds, engine_ms)
        recorded = sum(len(session.close()) for session in sessions)
        assert recorded >= result["calls"] * seconds * 0.9, "calls went unrecorded"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="per row")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(asyncio.run(load_http(json.load(sys.stdin)))))
        return
    line = "| {:22} | {:>8} | {:>8} | {:>9} | {:>9} | {:>10} |".format
    for engine_ms in (0.0, 100.0):
        print(f"\nengine takes {engine_ms:g} ms\n")
        print(line("way", "episodes", "calls/s", "p50 ms", "p99 ms", "added ms"))
        if args.markdown:
            print("| --- | --- | --- | --- | --- | --- |")
        for way in WAYS:
            for episodes in EPISODES:
                r = measure(way, episodes, engine_ms, args.seconds)
                added = f"{r['p50'] - engine_ms:.2f}"
                row = (f"{r['calls']:.0f}", f"{r['p50']:.2f}", f"{r['p99']:.2f}", added)
                print(line(way, episodes, *row), flush=True)


if __name__ == "__main__":
    main()
