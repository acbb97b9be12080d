"""Steps/s of each environment, bare and through each layer of ours.

The same actions are played in turn, with a reset wherever an episode ends: bare (a plain loop
over the environment in one thread), one at a time through `gym_env` (thread hop and deadline),
many at once through the pool, and one and many at once through the HTTP service in a process
of its own. `cpu` is processor time of all processes together for one step, which does not
depend on what else the machine does: what it is above the bare one's, our layer adds. Each
figure is the best of two runs of 1.5 seconds; all of it takes some four minutes on two cores.
It does not show what a model's turn takes, which is a thousand times more.

    python benchmarks/envs.py [--write] [--parallel 200] [--only webshop,miniwob]
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
from record import Report

from astuner.config.schema import AstunerConfig
from astuner.env import EnvPool, GymEnv, environment_service, open_environments
from astuner.env.registry import find_environment
from astuner.errors import AstunerError
from astuner.types import Task

RUNS = 2
SECONDS = 1.5


@dataclass(frozen=True)
class World:
    name: str
    actions: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict[str, Any])
    at_once: int = 10**6
    """As many as two cores carry."""

    @property
    def title(self) -> str:
        told = (self.params.get(key) for key in ("game", "dataset", "task"))
        return " ".join([self.name, *(str(value) for value in told if value)])


WORLDS = [
    World("toy_text", ("left", "down", "right", "up"), {"game": "FrozenLake", "map_name": "4x4"}),
    World("toy_text", ("south", "north", "east", "west"), {"game": "Taxi"}),
    World("toy_text", ("hit", "stick"), {"game": "Blackjack"}),
    World("toy_text", ("up", "right", "left"), {"game": "CliffWalking"}),
    World("CartPole-v1", ("left", "right")),
    World("textarena", ("[3]", "[9]", "[7]"), {"game": "GuessTheNumber-v0"}),
    World("reasoning_gym", ("12",), {"dataset": "chain_sum"}),
    World(
        "webshop", ("search[black boots]", "click[next >]", "click[< prev]"), {"max_steps": 10**6}
    ),
    World(
        "miniwob",
        ("click(1)", "wait()"),
        {"task": "click-checkboxes", "settle": 0, "max_steps": 10**6},
        at_once=4,
    ),
]


@dataclass(frozen=True)
class Rate:
    steps: int
    seconds: float
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        return self.steps / self.seconds

    @property
    def cpu_us(self) -> float:
        return 1e6 * self.cpu_seconds / self.steps


@dataclass(frozen=True)
class Row:
    world: World
    bare: Rate
    one: Rate
    many: Rate
    one_http: Rate
    many_http: Rate

    def figures(self, parallel: int) -> dict[str, Any]:
        rates = (self.bare, self.one, self.many, self.one_http, self.many_http)
        cells: dict[str, Any] = {"environment": self.world.title}
        cells["many"] = min(parallel, self.world.at_once)
        for way, rate in zip(WAYS, rates, strict=True):
            cells |= {f"{way}: steps/s": rate.per_second, f"{way}: cpu us": rate.cpu_us}
        return cells


WAYS = ("bare", "gym_env", "many at once", "HTTP", "many over HTTP")


def cpu_seconds() -> float:
    """Of this process and all that it started."""
    children = psutil.Process().children(recursive=True)
    used = [child.cpu_times() for child in children]
    return time.process_time() + sum(times.user + times.system for times in used)


def bare(world: World) -> Rate:
    env = find_environment(world.name)("t", {**world.params, "seed": 0})
    env.reset(seed=0)
    steps, began, cpu = 0, time.perf_counter(), cpu_seconds()
    while (passed := time.perf_counter() - began) < SECONDS:
        _, _, terminated, truncated, _ = env.step(world.actions[steps % len(world.actions)])
        steps += 1
        if terminated or truncated:
            env.reset(seed=steps)
    rate = Rate(steps, passed, cpu_seconds() - cpu)
    getattr(env, "close", lambda: None)()
    return rate


async def walk(env: GymEnv, actions: tuple[str, ...], ends: float) -> int:
    """The steps taken until then."""
    steps = 0
    while time.perf_counter() < ends:
        _, _, terminated, truncated, _ = await env.step(actions[steps % len(actions)])
        steps += 1
        if terminated or truncated:
            await env.reset(seed=steps)
    return steps


async def timed(config: AstunerConfig, world: World, many: int) -> Rate:
    """`many` walks at once, in instances that exist already."""
    pool = open_environments(config)
    assert pool is not None
    try:
        opened = await asyncio.gather(*(begun(pool, number) for number in range(many)))
        began, cpu = time.perf_counter(), cpu_seconds()
        walks = (walk(env, world.actions, began + SECONDS) for env in opened)
        steps = sum(await asyncio.gather(*walks))
        return Rate(steps, time.perf_counter() - began, cpu_seconds() - cpu)
    finally:
        await asyncio.to_thread(pool.close)


async def begun(pool: EnvPool, number: int) -> GymEnv:
    env = await pool.open(Task(task_id="t"), f"e{number}")
    await env.reset()
    return env


async def best(measure: Callable[[], Awaitable[Rate]]) -> Rate:
    return max([await measure() for _ in range(RUNS)], key=lambda rate: rate.per_second)


def configured(world: World, *, service: bool) -> AstunerConfig:
    config = AstunerConfig()
    config.env.params, config.env.max_instances = world.params, 1000
    if service:
        config.env.service = world.name
    else:
        config.env.type = world.name
    return config


async def measure(world: World, parallel: int) -> Row:
    local, remote = configured(world, service=False), configured(world, service=True)
    many = min(parallel, world.at_once)
    plain = max((bare(world) for _ in range(RUNS)), key=lambda rate: rate.per_second)
    inside = [await best(lambda n=n: timed(local, world, n)) for n in (1, many)]
    with environment_service(remote):
        outside = [await best(lambda n=n: timed(remote, world, n)) for n in (1, many)]
    return Row(world, plain, *inside, *outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--parallel", type=int, default=200)
    parser.add_argument("--only", default="", help="names, divided by commas")
    args = parser.parse_args()
    report = Report("envs", __doc__, write=args.write)
    names = [world.name for world in WORLDS]
    only = args.only.split(",") if args.only else names
    if unknown := sorted({*only} - {*names}):
        parser.error(f"--only: there is no {unknown[0]!r}; choose from {sorted({*names})}")
    for world in (world for world in WORLDS if world.name in only):
        try:
            row = asyncio.run(measure(world, args.parallel))
        except AstunerError as error:
            print(f"{world.title}: {error}", flush=True)
            continue
        report.row("Steps a second, and processor time a step", row.figures(args.parallel))


if __name__ == "__main__":
    main()
