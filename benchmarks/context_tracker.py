"""How long the context tracker takes, and how much memory, as episodes grow.

Builds episodes of 100, 1,000 and 10,000 calls in six shapes and prints, for each, the
best of three runs. `tokens` are those of the samples, `read` those of all recorded prompts
and completions (what "linear" is measured against: ns/token must not grow down a column).
`peak/ids` is the peak allocated while building, the finished samples with it, as a multiple
of the 4 bytes of each token's id; `peak/fields` of all that is told of a token (id, mask,
logprob, weight version, turn: 17 bytes); `samples/ids` is what is left of it once they are
built. Each turn adds 16 tokens (in `tools` 128), of which 8 are sampled. It does not show the
time of recording the calls, which is the proxy's, nor the memory of the calls themselves.

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
from astuner.types import Call, Sample, TokenIds

TURN = 16
"""Tokens a turn adds, but for long results of tools."""
SAMPLED = 8
"""Of them, at the end."""
SIZES = (100, 1_000, 10_000)
ID, FIELDS = 4, 4 + 1 + 4 + 4 + 4
"""Bytes of a token's id; and of its id, mask, logprob, weight version and turn."""
TABLE = "Building the samples"


def _call(n: int, ids: TokenIds, agent: str, parent: int | None) -> Call:
    return Call(
        call_id=f"c{n}",
        episode_id="e",
        agent_name=agent,
        target_tag="default",
        prompt_ids=ids[:-SAMPLED],
        completion_ids=ids[-SAMPLED:],
        logprobs=np.full(SAMPLED, -1.0, np.float32),
        weight_versions=np.zeros(SAMPLED, np.int32),
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
        _call(n, np.concatenate([prompt, _random(SAMPLED, n)]), "a", None) for n in range(calls)
    ]


def tools(calls: int) -> list[Call]:
    """Conversations of up to 100 turns with tools' results of 120 tokens; each starts anew."""
    made: list[Call] = []
    for n in range(0, calls, 100):
        ids = _random(100 * 128, n)
        for turn in range(100):
            parent = n + turn - 1 if turn else None
            made.append(_call(n + turn, ids[: (turn + 1) * 128], "a", parent))
    return made


def agents(calls: int) -> list[Call]:
    """After each turn, an agent starts another, with a prompt of 256 tokens and for 9 turns."""
    whole = _random(calls // 10 * TURN, 0)
    made: list[Call] = []
    for n in range(calls):
        turn, inner = divmod(n, 10)
        if inner == 0:
            other = _random(256 + 9 * TURN, turn + 1)
            parent = n - 10 if turn else None
            made.append(_call(n, whole[: (turn + 1) * TURN], "a", parent))
        else:
            parent = n - 1 if inner > 1 else None
            made.append(_call(n, other[: 256 + inner * TURN], "b", parent))
    return made


SHAPES: dict[str, Callable[[int], list[Call]]] = {
    "linear": linear,
    "tools": tools,
    "agents": agents,
    "unhinted": unhinted,
    "forked": forked,
    "parallel": parallel,
}


def _build(calls: list[Call]) -> tuple[Sample, ...]:
    return build_samples(
        calls,
        group_id="g",
        task_id="t",
        reward=1.0,
        trainable_targets=None,
        max_prompt_tokens=None,
        max_total_tokens=None,
    )


def _tokens(calls: list[Call]) -> int:
    samples = _build(calls)
    assert sum(s.num_trained for s in samples) == sum(len(c.completion_ids) for c in calls)
    return sum(len(s.token_ids) for s in samples)


def _seconds(calls: list[Call]) -> float:
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        _build(calls)
        times.append(time.perf_counter() - start)
    return min(times)


def _bytes(calls: list[Call]) -> tuple[int, int]:
    """At the peak, and of the finished samples."""
    tracemalloc.start()
    samples = _build(calls)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del samples
    return peak, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--write", action="store_true")
    report = Report("context_tracker", __doc__, write=parser.parse_args().write)
    slowest = most = 0.0
    for name, shape in SHAPES.items():
        for size in SIZES:
            calls = shape(size)
            tokens = _tokens(calls)
            read = sum(len(c.prompt_ids) + len(c.completion_ids) for c in calls)
            seconds, (peak, left) = _seconds(calls), _bytes(calls)
            report.row(
                TABLE,
                {
                    "shape": name,
                    "calls": size,
                    "tokens": tokens,
                    "read": read,
                    "seconds": seconds,
                    "ns/token read": seconds / read * 1e9,
                    "peak/ids": peak / (ID * tokens),
                    "peak/fields": peak / (FIELDS * tokens),
                    "samples/ids": left / (ID * tokens),
                },
            )
        slowest, most = max(slowest, seconds), max(most, peak / (ID * tokens))
    report.figure(TABLE, "tracker, seconds for 10,000 calls, worst shape", slowest, "under 1")
    name = "tracker, peak memory / token ids, 10,000 calls, worst shape"
    report.figure(TABLE, name, most, "at most 3")


if __name__ == "__main__":
    main()
