"""The fine-tuning service under 1, 8 and 64 tenants, against the same engine without it.

    python benchmarks/service.py [--model smollm2-135m] [--tenants 1 8 64] [--write]

Throughput: the same work each time, `--sequences` random sequences of `--length` tokens to
train on (LoRA of rank 8, one optimizer step a tenant) and as many to sample from a prompt of
16 tokens, split among the tenants, each with a run, a key and a connection of its own.
`engine` is one adapter in this process, without HTTP. `small calls` are heartbeats that one
more client sends all the while. `at once` are `--seconds` in which half of the tenants (a lone
one by itself) train without pause and the others keep 32 sequences being sampled: what is
then done a second of each. `MB a tenant` is what adapter, optimizer and sampling weights take
in the engine; `RSS` what the server's process grew by for each, before that. Engine and server
have trained and sampled a little before anything is timed.

A server is started for each row, with nothing on disk. Measure with nothing else running. It
does not show what an SDK takes on the client's side, nor checkpoints on disk.
"""

from __future__ import annotations

import astuner  # noqa: F401 - first: it tells OpenMP not to spin, which torch reads when loaded

# isort: split
import argparse
import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from record import Report
from service_client import RANK, Client, serve

from astuner.config.service import ServiceConfig, load_service_config
from astuner.engine.protocol import AdamParams, LoraSpec, LossSpec, SamplingParams, generate
from astuner.service.datums import Datum, TrainRequest, loss_spec, samples
from astuner.service.serve import load_base

TABLE = "Tenants"
PROMPT, CHUNK = 16, 4
IN_FLIGHT = 32
BETWEEN_SMALL_CALLS = 0.05


# ---------------------------------------------------------------- throughput


@dataclass
class Speed:
    """What one row of the table is made of."""

    trained: float
    """Tokens a second, as are these."""
    sampled: float
    trained_at_once: float = 0.0
    sampled_at_once: float = 0.0
    small_calls: list[float] = field(default_factory=list[float])
    bytes_each: float = 0.0
    rss_each: float = 0.0


def random_ids(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(5, vocabulary, (count, length)).tolist()


def chunks(items: Sequence[Any], size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]


async def engine_alone(
    config: ServiceConfig, count: int, length: int, seconds: float
) -> tuple[Speed, int]:
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
    new = length - PROMPT

    async def train_some(_: int) -> int:
        await host.forward_backward("one", as_samples(data[:CHUNK], size), cross_entropy)
        return CHUNK * (length - 1)

    async def sample_some(i: int) -> int:
        await generate(From(), data[i % count][:PROMPT], params)
        return new

    at_once = await both(seconds, [train_some], [sample_some] * IN_FLIGHT)
    host.close()  # type: ignore[attr-defined]
    held = float(stats.resident_bytes + stats.swapped_bytes)
    speed = Speed(count * (length - 1) / trained, count * new / sampled, *at_once)
    return replace(speed, bytes_each=held), size


Work = Callable[[int], Awaitable[int]]
"""Its number -> how many tokens it did."""


async def both(
    seconds: float, training: Sequence[Work], sampling: Sequence[Work]
) -> tuple[float, float]:
    """Tokens a second of each kind, while each piece of work is done again and again; what is
    under way after `seconds` is waited for."""
    begun = time.perf_counter()

    async def again(work: Work, i: int) -> int:
        done = 0
        for number in itertools.count(i, IN_FLIGHT):
            done += await work(number)
            if time.perf_counter() - begun > seconds:
                break
        return done

    kinds = (training, sampling)
    counts = await asyncio.gather(
        *(asyncio.gather(*(again(w, i) for i, w in enumerate(kind))) for kind in kinds)
    )
    elapsed = time.perf_counter() - begun
    trained, sampled = (sum(done) / elapsed for done in counts)
    return trained, sampled


async def at_once(
    seconds: float, clients: Sequence[Client], data: Sequence[list[list[int]]], length: int
) -> tuple[float, float]:
    """The same over HTTP: every other tenant trains, the rest samples; a lone one does both."""
    pairs = list(zip(clients, data, strict=True))
    trainers, drawers = pairs[::2], pairs[1::2] or pairs
    samplers = [await client.sampler() for client, _ in drawers]

    def training(client: Client, own: list[list[int]]) -> Work:
        async def work(_: int) -> int:
            await client.train(own[:CHUNK])
            return len(own[:CHUNK]) * (length - 1)

        return work

    def sampling(which: int) -> Work:
        (client, own), sampler = drawers[which], samplers[which]

        async def work(number: int) -> int:
            prompt = own[number % len(own)][:PROMPT]
            tokens, _ = await client.sample(sampler, number + 1, prompt, length - PROMPT)
            return len(tokens)

        return work

    return await both(
        seconds,
        [training(*pair) for pair in trainers],
        [sampling(i % len(drawers)) for i in range(IN_FLIGHT)],
    )


def as_samples(sequences: Sequence[Sequence[int]], vocabulary: int) -> Any:
    """As the service makes them of datums."""
    data = [
        Datum(np.asarray(ids[:-1], np.int32), {"target_tokens": np.asarray(ids[1:], np.int64)})
        for ids in sequences
    ]
    request = TrainRequest("one", 1, data, "cross_entropy", {}, forward_only=False)
    loss_spec(request)
    return samples(request, max_context=10**9, vocab_size=vocabulary)


async def throughput(args: argparse.Namespace, tenants: int, size: int) -> Speed:
    count, length = args.sequences, args.length
    with serve(args.model, args.dtype, tenants) as server:
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
            mixed = await at_once(args.seconds, clients, data, length)
    total = share * tenants
    return Speed(
        total * (length - 1) / trained, total * (length - PROMPT) / sampled, *mixed,
        small_calls=small, rss_each=grown / tenants,
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


# ---------------------------------------------------------------- the table


def row(name: str, speed: Speed, alone: Speed) -> dict[str, Any]:
    cells: dict[str, Any] = {
        "tenants": name,
        "trained tokens/s": speed.trained,
        "trained: % of engine": 100 * speed.trained / alone.trained,
        "sampled tokens/s": speed.sampled,
        "sampled: % of engine": 100 * speed.sampled / alone.sampled,
        "at once: trained tokens/s": speed.trained_at_once,
        "at once: sampled tokens/s": speed.sampled_at_once,
    }
    if speed.small_calls:
        calls = np.asarray(speed.small_calls) * 1000
        cells |= {"small calls p50 ms": float(np.quantile(calls, 0.5))}
        cells |= {"p99 ms": float(np.quantile(calls, 0.99))}
    cells["MB a tenant"] = speed.bytes_each / 1e6 or None
    cells["RSS MB a tenant"] = speed.rss_each / 1e6 or None
    return cells


async def measure(args: argparse.Namespace, report: Report) -> None:
    config = load_service_config(None, [f"model.path={args.model}", f"model.dtype={args.dtype}"])
    alone, size = await engine_alone(config, args.sequences, args.length, args.seconds)
    report.row(TABLE, row("engine", alone, alone))
    for tenants in args.tenants:
        speed = await throughput(args, tenants, size)
        report.row(TABLE, row(str(tenants), speed, alone))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    asyncio.run(measure(args, Report("service", __doc__, write=args.write)))


if __name__ == "__main__":
    main()
