"""Steps/s of each environment, bare and through each layer of ours.

For each environment the same seeded random walk is played: bare (a plain loop over the
environment in one thread), one at a time through `gym_env` (thread hop and deadline), many
at once through the pool, and many at once through the HTTP service in a process of its own.
`adds` is what one step through our layer costs on top of the bare one. Best of three runs.

    python benchmarks/envs.py [--markdown] [--parallel 200] [--steps 2000]
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from astuner.config.schema import AstunerConfig
from astuner.env import EnvPool, environment_service, open_environments
from astuner.env.registry import find_environment
from astuner.types import Task

WORLDS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("toy_text", {"game": "FrozenLake", "map_name": "4x4"}, ("left", "down", "right", "up")),
    ("toy_text", {"game": "Taxi"}, ("south", "north", "east", "west")),
    ("toy_text", {"game": "Blackjack"}, ("hit", "stick")),
    ("toy_text", {"game": "CliffWalking"}, ("up", "right", "left")),
    ("FrozenLake-v1", {"map_name": "4x4"}, ("left", "down", "right", "up")),
    ("CartPole-v1", {}, ("left", "right")),
]
RUNS = 3


@dataclass(frozen=True)
class Row:
    name: str
    bare: float
    """Steps/s."""
    one: float
    pool: float
    service: float

    @property
    def adds_one(self) -> float:
        """Microseconds a step."""
        return 1e6 / self.one - 1e6 / self.bare


def bare(name: str, params: dict[str, Any], actions: tuple[str, ...], steps: int) -> float:
    env = find_environment(name)("t", {**params, "seed": 0})
    env.reset(seed=0)
    began = time.perf_counter()
    for step in range(steps):
        _, _, terminated, truncated, _ = env.step(actions[step % len(actions)])
        if terminated or truncated:
            env.reset(seed=step)
    return steps / (time.perf_counter() - began)


async def walk(pool: EnvPool, actions: tuple[str, ...], steps: int, number: int) -> None:
    env = await pool.open(Task(task_id="t"), f"e{number}")
    await env.reset()
    for step in range(steps):
        _, _, terminated, truncated, _ = await env.step(actions[step % len(actions)])
        if terminated or truncated:
            await env.reset(seed=step)
    pool.release(env)


async def timed(config: AstunerConfig, actions: tuple[str, ...], steps: int, many: int) -> float:
    """Steps/s of `many` walks at once, `steps` in all."""
    pool = open_environments(config)
    assert pool is not None
    each = max(1, steps // many)
    warm_up = 1
    await asyncio.gather(*(walk(pool, actions, warm_up, n) for n in range(many)))
    began = time.perf_counter()
    await asyncio.gather(*(walk(pool, actions, each, n) for n in range(many)))
    seconds = time.perf_counter() - began
    pool.close()
    return each * many / seconds


async def best(measure: Callable[[], Awaitable[float]]) -> float:
    return max([await measure() for _ in range(RUNS)])


def configured(name: str, params: dict[str, Any], *, service: bool) -> AstunerConfig:
    config = AstunerConfig()
    config.env.params, config.env.max_instances = params, 1000
    if service:
        config.env.service = name
    else:
        config.env.type = name
    return config


async def measure(
    name: str, params: dict[str, Any], actions: tuple[str, ...], steps: int, parallel: int
) -> Row:
    local = configured(name, params, service=False)
    remote = configured(name, params, service=True)
    with environment_service(remote):
        return Row(
            " ".join([name, *(str(v) for v in params.values())]),
            max(bare(name, params, actions, steps) for _ in range(RUNS)),
            await best(lambda: timed(local, actions, steps, 1)),
            await best(lambda: timed(local, actions, steps, parallel)),
            await best(lambda: timed(remote, actions, steps, parallel)),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--parallel", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    columns = [
        "environment",
        "bare, steps/s",
        "gym_env, steps/s",
        "adds, us/step",
        f"{args.parallel} at once, steps/s",
        f"{args.parallel} at once over HTTP, steps/s",
    ]
    edge = "|" if args.markdown else ""
    print(edge + " | ".join(columns) + edge)
    if args.markdown:
        print("|" + "---|" * len(columns))
    for name, params, actions in WORLDS:
        row = asyncio.run(measure(name, params, actions, args.steps, args.parallel))
        figures = [row.bare, row.one, row.adds_one, row.pool, row.service]
        print(edge + " | ".join([row.name, *(f"{f:,.0f}" for f in figures)]) + edge, flush=True)


if __name__ == "__main__":
    main()
