"""How long the context tracker takes, and how much memory, as episodes grow.

Builds episodes of 100, 1,000 and 10,000 calls in three shapes and prints, for each, the
best of three runs. `tokens` are those of the final conversations, `read` those of all
recorded prompts and completions (what "linear" is measured against: ns/token must not
grow down a column), `memory` is the peak allocated while building, as a multiple of the
bytes of the samples' token ids (the finished samples alone are 4.25: ids, mask, logprobs,
weight versions, turns). Each turn adds 16 tokens, half of them sampled. It does not show the
time of recording the calls, which is the proxy's.

    python benchmarks/context_tracker.py [--write]
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
from record import Report

from astuner.context_tracker import build_samples
from astuner.types import Call, TokenIds

TURN = 16
"""Tokens a turn adds: half of them context, half sampled."""
SIZES = (100, 1_000, 10_000)
FINISHED = 4.25
"""Bytes of a finished sample over those of its token ids."""
TABLE = "Building the samples"


def _call(n: int, ids: TokenIds, agent: str, parent: int | None) -> Call:
    half = TURN // 2
    return Call(
        call_id=f"c{n}",
        episode_id="e",
        agent_name=agent,
        target_tag="default",
        prompt_ids=ids[:-half],
        completion_ids=ids[-half:],
        logprobs=np.full(half, -1.0, np.float32),
        weight_versions=np.zeros(half, np.int32),
        finish_reason="stop",
        request={},
        response={},
        started_at=float(n),
        ended_at=float(n) + 0.5,
        parent_id=None if parent is None else f"c{parent}",
    )


def _random(tokens: int, seed: int) -> TokenIds:
    return np.random.default_rng(seed).integers(0, 50_000, tokens, dtype=np.int32)


def linear(calls: int) -> list[Call]:
    """One conversation; prompts are views of it, so that 10,000 of them fit in memory."""
    ids = _random(calls * TURN, 0)
    return [_call(n, ids[: (n + 1) * TURN], "a", n - 1 if n else None) for n in range(calls)]


def unhinted(calls: int) -> list[Call]:
    """Ten conversations by turns under one agent name, without recorded parents: every
    call has to be found by its hash."""
    turns = calls // 10
    talks = [_random(turns * TURN, seed) for seed in range(10)]
    return [_call(n, talks[n % 10][: (n // 10 + 1) * TURN], "a", None) for n in range(calls)]


def forked(calls: int) -> list[Call]:
    """A conversation of calls/2 turns, at most 200; the other calls fork off it, evenly."""
    trunk = min(calls // 2, 200)
    made = linear(trunk)
    ids = np.concatenate([made[-1].prompt_ids, made[-1].completion_ids])
    for n in range(trunk, calls):
        parent = (n * 7) % trunk
        fork = np.concatenate([ids[: (parent + 1) * TURN], _random(TURN, n)])
        made.append(_call(n, fork, "a", parent))
    return made


def parallel(calls: int) -> list[Call]:
    """All calls share one prompt of 512 tokens and none continues another."""
    prompt = _random(512, 0)
    return [
        _call(n, np.concatenate([prompt, _random(TURN // 2, n)]), "a", None) for n in range(calls)
    ]


SHAPES: dict[str, Callable[[int], list[Call]]] = {
    "linear": linear,
    "unhinted": unhinted,
    "forked": forked,
    "parallel": parallel,
}


def _build(calls: list[Call]) -> int:
    samples = build_samples(
        calls,
        group_id="g",
        task_id="t",
        reward=1.0,
        trainable_targets=None,
        max_prompt_tokens=None,
        max_total_tokens=None,
    )
    assert sum(s.num_trained for s in samples) == sum(len(c.completion_ids) for c in calls)
    return sum(len(s.token_ids) for s in samples)


def _seconds(calls: list[Call]) -> float:
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        _build(calls)
        times.append(time.perf_counter() - start)
    return min(times)


def _peak_bytes(calls: list[Call]) -> int:
    tracemalloc.start()
    _build(calls)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--write", action="store_true")
    report = Report("context_tracker", __doc__, write=parser.parse_args().write)
    slowest = most = 0.0
    for name, shape in SHAPES.items():
        for size in SIZES:
            calls = shape(size)
            tokens = _build(calls)
            read = sum(len(c.prompt_ids) + len(c.completion_ids) for c in calls)
            seconds, memory = _seconds(calls), _peak_bytes(calls) / (4 * tokens)
            report.row(
                TABLE,
                {
                    "shape": name,
                    "calls": size,
                    "tokens": tokens,
                    "read": read,
                    "seconds": seconds,
                    "ns/token read": seconds / read * 1e9,
                    "memory": memory,
                },
            )
        slowest, most = max(slowest, seconds), max(most, memory)
    report.figure(TABLE, "tracker, seconds for 10,000 calls, worst shape", slowest, "under 1")
    share = most / FINISHED
    report.figure(TABLE, "tracker, peak memory / finished samples, worst shape", share, "at most 3")


if __name__ == "__main__":
    main()
