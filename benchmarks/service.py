"""The fine-tuning service under 1, 8 and 64 tenants, against the same engine without it.

    python benchmarks/service.py [--model smollm2-135m] [--tenants 1 8 64] [--write]

Throughput: the same work each time, `--sequences` random sequences of `--length` tokens to
train on (LoRA of rank 8, one optimizer step a tenant) and as many to sample from a prompt of
16 tokens, split among the tenants, each with a run, a key and a connection of its own.
`engine` is one adapter in this process, without HTTP. `small calls` are heartbeats that one
more client sends all the while. `MB a tenant` is what adapter, optimizer and sampling weights
take in the engine; `RSS` what the server's process grew by for each, at its end. Engine and
server have trained and sampled a little before anything is timed.

Agreement: over HTTP, the logprob that each token was sampled with against the trainer's
own `forward`, on 64 random sequences, before any update and after three, in both dtypes.

A server is started for each row, with nothing on disk. Measure with nothing else running;
the whole takes less than ten minutes on two cores. `--write` puts the tables, with commit
and machine, into benchmarks/results/service.md.
"""

from __future__ import annotations

import astuner  # noqa: F401 - first: it tells OpenMP not to spin, which torch reads when loaded

# isort: split
import argparse
import asyncio
import contextlib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from tinker.proto import tinker_public_pb2 as pb

from astuner.config.service import ServiceConfig, load_service_config
from astuner.engine.protocol import AdamParams, LoraSpec, LossSpec, SamplingParams, generate
from astuner.service.datums import Datum, TrainRequest, loss_spec, samples
from astuner.service.serve import load_base

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "service.md"
RANK, PROMPT, CHUNK = 8, 16, 4
BETWEEN_SMALL_CALLS = 0.05
PROTO = {"Content-Type": "application/x-protobuf"}
Rows = list[list[str]]


# ---------------------------------------------------------------- a client


@dataclass
class Client:
    """One tenant: a session, and a run in it."""

    http: httpx.AsyncClient
    model: str
    session: str = ""
    run: str = ""
    seq: int = 0
    samplers: int = 0

    async def post(self, path: str, body: Any) -> Any:
        content = {"content": body, "headers": PROTO} if isinstance(body, bytes) else {"json": body}
        while True:
            response = await self.http.post(path, **content)
            if response.status_code != 429:  # "not now"
                break
            await asyncio.sleep(0.2)
        if response.status_code != 200:
            raise RuntimeError(f"{path}: {response.status_code} {response.text}")
        return response.json()

    async def done(self, future: Any) -> Any:
        """The result of a future: JSON, or the bytes of a protobuf message."""
        while True:
            asked = {"request_id": future["request_id"]}
            response = await self.http.post("/retrieve_future", json=asked)
            if response.status_code != 408:  # "not yet"
                break
        if "protobuf" in response.headers["content-type"]:
            return response.content
        body = response.json()
        if response.status_code != 200 or "error" in body:
            raise RuntimeError(f"{future['request_id']}: {response.status_code} {body}")
        return body

    async def open(self) -> None:
        self.session = (await self.post("/create_session", {}))["session_id"]
        wish = {"session_id": self.session, "model_seq_id": 0, "base_model": self.model}
        wish["lora_config"] = {"rank": RANK, "seed": 0}
        self.run = (await self.done(await self.post("/create_model", wish)))["model_id"]

    async def train(self, sequences: Sequence[Sequence[int]], *, forward: bool = False) -> Any:
        """The logprobs of every sequence's tokens but the first, as one array."""
        self.seq += 1
        message = pb.ForwardBackwardRequest(
            model_id=self.run, seq_id=self.seq, loss_fn="cross_entropy", forward_only=forward
        )
        for ids in sequences:
            datum = message.data.add()
            chunk = datum.model_input.add()
            chunk.encoded_text.tokens = np.asarray(ids[:-1], "<i4").tobytes()
            target = datum.loss_fn_inputs["target_tokens"]
            target.dense, target.dtype = np.asarray(ids[1:], "<i8").tobytes(), pb.DTYPE_INT64
        body = await self.done(await self.post("/forward_backward", message.SerializeToString()))
        record = pb.ForwardBackwardOutput.FromString(body).loss_fn_outputs[0]
        return np.frombuffer(record.fields["logprobs"].data, "<f4")

    async def step(self, lr: float = 1e-3) -> None:
        self.seq += 1
        body = {"model_id": self.run, "seq_id": self.seq, "adam_params": {"learning_rate": lr}}
        await self.done(await self.post("/optim_step", body))

    async def sampler(self) -> str:
        self.seq, self.samplers = self.seq + 1, self.samplers + 1
        body = {"model_id": self.run, "seq_id": self.seq, "sampling_session_seq_id": self.samplers}
        made = await self.post("/save_weights_for_sampler", body | {"kind": "snapshot"})
        return (await self.done(made))["sampling_session_id"]

    async def sample(self, sampler: str, seq: int, prompt: Sequence[int], length: int) -> Any:
        """(token ids, logprobs) of one sequence."""
        body = {
            "sampling_session_id": sampler,
            "seq_id": seq,
            "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
            "sampling_params": {"max_tokens": length, "temperature": 1.0, "seed": seq, "stop": []},
        }
        answer = await self.done(await self.post("/asample", body))
        (found,) = pb.SampleResponse.FromString(answer).sequences
        return np.frombuffer(found.tokens, "<i4"), np.frombuffer(found.logprobs, "<f4")


# ---------------------------------------------------------------- a server


@dataclass
class Server:
    url: str
    process: psutil.Process
    model: str

    @asynccontextmanager
    async def client(self, number: int) -> AsyncGenerator[Client]:
        async with httpx.AsyncClient(
            base_url=f"{self.url}/api/v1", headers={"X-API-Key": key(number)}, timeout=300
        ) as http:
            yield Client(http, self.model)


def key(number: int) -> str:
    return f"tml-benchmark-{number}"


@contextlib.contextmanager
def serve(model: str, dtype: str, tenants: int):
    """`astuner serve` with nothing on disk, until the block ends."""
    command = [sys.executable, "-m", "astuner.cli", "serve", "--model", model, "port=0"]
    command += [f"model.dtype={dtype}", "persistence=none", "model.name=it"]
    command += [f"keys.t{i}={key(i)}" for i in range(tenants + 1)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.match(r"Serving \S+ at (\S+) for", line):
                yield Server(found[1], psutil.Process(process.pid), "it")
                return
        raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait(60)


# ---------------------------------------------------------------- throughput


@dataclass
class Speed:
    """What one row of the table is made of."""

    trained: float
    """Tokens a second, as are these."""
    sampled: float
    small_calls: list[float] = field(default_factory=list[float])
    bytes_each: float = 0.0
    rss_each: float = 0.0


def random_ids(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(5, vocabulary, (count, length)).tolist()


def chunks(items: Sequence[Any], size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]


async def engine_alone(config: ServiceConfig, count: int, length: int) -> tuple[Speed, int]:
    """The same work on the engine in this process; also the size of the vocabulary."""
    base, _ = load_base(config)
    host, size = base.host, base.vocab_size
    data = random_ids(count, length, size, 0)
    await host.create("warm", LoraSpec(RANK, 32.0))
    cross_entropy = LossSpec("cross_entropy")
    await host.forward_backward("warm", as_samples(data[:CHUNK], size), cross_entropy)
    await host.optim_step("warm", AdamParams(1e-3))
    await host.release("warm")
    await host.create("one", LoraSpec(RANK, 32.0), seed=0)
    begun = time.perf_counter()
    for part in chunks(data, CHUNK):
        await host.forward_backward("one", as_samples(part, size), cross_entropy)
    await host.optim_step("one", AdamParams(1e-3))
    trained = time.perf_counter() - begun
    snapshot = await host.snapshot("one")

    class From:
        max_context = host.max_context

        def stream(self, ids: Sequence[int], params: SamplingParams) -> Any:
            return host.stream(ids, params, weights=snapshot)

    params = SamplingParams(max_tokens=length - PROMPT, temperature=1.0)
    await generate(From(), data[0][:PROMPT], params)
    begun = time.perf_counter()
    await asyncio.gather(*(generate(From(), ids[:PROMPT], params) for ids in data))
    sampled = time.perf_counter() - begun
    stats = host.stats()
    host.close()  # type: ignore[attr-defined]
    new = count * (length - PROMPT)
    held = float(stats.resident_bytes + stats.swapped_bytes)
    return Speed(count * (length - 1) / trained, new / sampled, bytes_each=held), size


def as_samples(sequences: Sequence[Sequence[int]], vocabulary: int) -> Any:
    """As the service makes them of datums."""
    data = [
        Datum(np.asarray(ids[:-1], np.int32), {"target_tokens": np.asarray(ids[1:], np.int64)})
        for ids in sequences
    ]
    request = TrainRequest("one", 1, data, "cross_entropy", {}, forward_only=False)
    loss_spec(request)
    return samples(request, max_context=10**9, vocab_size=vocabulary)


async def throughput(
    model: str, dtype: str, tenants: int, count: int, length: int, size: int
) -> Speed:
    with serve(model, dtype, tenants) as server:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(server.client(i)) for i in range(tenants)]
            prober = await stack.enter_async_context(server.client(tenants))
            await prober.open()
            warm = random_ids(CHUNK, length, size, tenants)
            await train(prober, warm)
            await draw(prober, warm, length)
            before = server.process.memory_info().rss
            await asyncio.gather(*(client.open() for client in clients))
            small: list[float] = []
            probing = asyncio.create_task(probe(prober, small))
            share = max(count // tenants, 1)
            data = [random_ids(share, length, size, i) for i in range(tenants)]
            trained = await timed([train(c, d) for c, d in zip(clients, data, strict=True)])
            sampled = await timed([draw(c, d, length) for c, d in zip(clients, data, strict=True)])
            probing.cancel()
            grown = server.process.memory_info().rss - before
    total = share * tenants
    return Speed(
        total * (length - 1) / trained, total * (length - PROMPT) / sampled, small,
        rss_each=grown / tenants,
    )  # fmt: skip


async def timed(work: Sequence[Coroutine[Any, Any, None]]) -> float:
    """Seconds until all are done."""
    begun = time.perf_counter()
    await asyncio.gather(*work)
    return time.perf_counter() - begun


async def train(client: Client, data: list[list[int]]) -> None:
    """All requests are on their way before the first answer is waited for."""
    await asyncio.gather(*(client.train(part) for part in chunks(data, CHUNK)), client.step())


async def draw(client: Client, data: list[list[int]], length: int) -> None:
    sampler = await client.sampler()
    new = length - PROMPT
    await asyncio.gather(
        *(client.sample(sampler, i + 1, ids[:PROMPT], new) for i, ids in enumerate(data))
    )


async def probe(client: Client, seconds: list[float]) -> None:
    while True:
        begun = time.perf_counter()
        await client.post("/session_heartbeat", {"session_id": client.session})
        seconds.append(time.perf_counter() - begun)
        await asyncio.sleep(BETWEEN_SMALL_CALLS)


# ---------------------------------------------------------------- agreement


async def agreement(model: str, dtype: str, length: int, size: int) -> list[float]:
    """The largest difference of a logprob between sampler and trainer, before and after."""
    found: list[float] = []
    prompts = random_ids(64, PROMPT, size, 7)
    with serve(model, dtype, 1) as server:
        async with server.client(0) as client:
            await client.open()
            for round_ in range(2):
                sampler = await client.sampler()
                drawn = await asyncio.gather(
                    *(
                        client.sample(sampler, i + 1, ids, length - PROMPT)
                        for i, ids in enumerate(prompts)
                    )
                )
                whole = [
                    [*ids, *tokens.tolist()]
                    for ids, (tokens, _) in zip(prompts, drawn, strict=True)
                ]
                theirs = np.concatenate([logprobs for _, logprobs in drawn])
                ours = (await client.train(whole, forward=True)).reshape(len(whole), -1)
                found.append(float(np.abs(ours[:, PROMPT - 1 :].ravel() - theirs).max()))
                for _ in range(3 if round_ == 0 else 0):
                    await client.train(whole[:8])
                    await client.step()
    return found


# ---------------------------------------------------------------- tables


def table(head: Sequence[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(name: str, speed: Speed, alone: Speed) -> list[str]:
    calls = np.asarray(speed.small_calls or [np.nan]) * 1000
    return [
        name,
        f"{speed.trained:.0f}",
        f"{speed.trained / alone.trained:.0%}",
        f"{speed.sampled:.0f}",
        f"{speed.sampled / alone.sampled:.0%}",
        *(f"{np.quantile(calls, q):.0f}" if speed.small_calls else "" for q in (0.5, 0.99)),
        f"{speed.bytes_each / 1e6:.1f}" if speed.bytes_each else "",
        f"{speed.rss_each / 1e6:.0f}" if speed.rss_each else "",
    ]


HEAD = (
    "tenants", "trained tokens/s", "of engine", "sampled tokens/s", "of engine",
    "small calls p50 ms", "p99 ms", "MB a tenant", "RSS MB a tenant",
)  # fmt: skip


async def measure(args: argparse.Namespace) -> str:
    config = load_service_config(None, [f"model.path={args.model}", f"model.dtype={args.dtype}"])
    alone, size = await engine_alone(config, args.sequences, args.length)
    rows = [row("engine", alone, alone)]
    print(*rows[-1], flush=True)
    for tenants in args.tenants:
        speed = await throughput(args.model, args.dtype, tenants, args.sequences, args.length, size)
        rows.append(row(str(tenants), speed, alone))
        print(*rows[-1], flush=True)
    differences: Rows = []
    for dtype, bound in (("bfloat16", 1e-3), ("float32", 1e-5)):
        before, after = await agreement(args.model, dtype, args.length, size)
        verdict = "yes" if max(before, after) < bound else "no"
        differences.append([dtype, f"{before:.2e}", f"{after:.2e}", f"{bound:g}", verdict])
        print(*differences[-1], flush=True)
    head = ("dtype", "before updates", "after 3 updates", "bound", "kept")
    return f"{table(HEAD, rows)}\n\nLargest difference of a logprob:\n\n{table(head, differences)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    begun = time.perf_counter()
    text = asyncio.run(measure(args))
    print(f"\n{text}\n\n{time.perf_counter() - begun:.0f} s in all")
    if args.write:
        RESULTS.write_text(f"# The fine-tuning service\n\n{where(args)}\n\n{text}\n")


def where(args: argparse.Namespace) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    cpus, memory = os.cpu_count(), psutil.virtual_memory().total / 2**30
    return (
        f"`python benchmarks/service.py --write` at commit {commit}: {args.model}, "
        f"{args.sequences} sequences of {args.length} tokens; {platform.machine()}, {cpus} cores, "
        f"{memory:.0f} GB, torch {torch.__version__}. See the script for what is measured."
    )


if __name__ == "__main__":
    main()
