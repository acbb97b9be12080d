"""Gives each episode an instance of its environment, and always takes it back.

At most `max_instances` exist at once; whoever comes later waits. An instance is released
when its episode ends, is cancelled or could not even start, and all of them when the pool
closes. While they live, the service is told so now and then. Environments are spoken to in
one event loop of its own, so that every method may be called from any thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

from astuner.env.loop import EnvLoop
from astuner.env.protocol import EnvClient
from astuner.env.session import GymEnv
from astuner.errors import EnvError
from astuner.types import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolSettings:
    env_type: str = ""
    """The environment of tasks that name none of their own."""
    params: Mapping[str, Any] | None = None
    """For every instance; a task's `metadata["env_params"]` win over them."""
    max_instances: int = 128
    seed: int = 0
    heartbeat: float = 20.0
    """Seconds between two signs of life for the instances."""
    release_timeout: float = 15.0
    release_pause: float = 2.0
    """Seconds before a release that failed is tried once more."""


class EnvPool:
    """The environments of a run."""

    def __init__(self, client: EnvClient, settings: PoolSettings) -> None:
        """The client belongs to the pool from now on."""
        self._client = client
        self._settings = settings
        self._loop = EnvLoop()
        self._slots = asyncio.Semaphore(settings.max_instances)
        self._held: dict[str, asyncio.Task[Any]] = {}
        """Instance id -> the task that makes it, from before it exists until it is released."""
        self._releases: set[Future[None]] = set()
        self._beat = self._loop.submit(self._keep_alive())
        self.counters: Counter[str] = Counter()
        """Failures by cause, steps and the time they took, under the names they are logged by."""

    @property
    def in_use(self) -> int:
        """Instances that exist, are being made, or are waited for."""
        return len(self._held)

    async def open(self, task: Task, episode_id: str) -> GymEnv:
        """An instance for one episode of this task. Raises EnvError or ConfigError."""
        instance_id = f"{episode_id}-{uuid4().hex[:8]}"
        try:
            return await self._loop.run(self._open(task, instance_id))
        except BaseException as error:
            if isinstance(error, EnvError):
                self.count(error)
            self._release(instance_id, None)
            raise

    def release(self, env: GymEnv) -> None:
        """Take the instance back; does not wait."""
        if env.trouble is not None:
            self.count(env.trouble)
        self.counters["env/steps"] += env.steps
        self.counters["env/milliseconds"] += round(1000 * env.seconds)
        self._release(env.instance_id, env)

    def count(self, error: EnvError) -> None:
        self.counters[f"env/failed/{error.cause}"] += 1

    def close(self) -> None:
        """Release everything that is left, and wait for it."""
        for instance_id in tuple(self._held):
            self._release(instance_id, None)
        wait(tuple(self._releases), timeout=self._settings.release_timeout + 1.0)
        self._beat.cancel()
        wait([self._loop.submit(self._client.aclose())], timeout=self._settings.release_timeout)
        self._loop.close()

    # ---------------------------------------------------------------- in the environments' loop

    async def _open(self, task: Task, instance_id: str) -> GymEnv:
        making = asyncio.create_task(self._make(task, instance_id))
        self._held[instance_id] = making
        return await asyncio.shield(making)

    async def _make(self, task: Task, instance_id: str) -> GymEnv:
        env_type = task.env_type or self._settings.env_type
        params = {**(self._settings.params or {}), **_own_params(task)}
        params.setdefault("seed", seed_of(self._settings.seed, task.task_id))
        await self._slots.acquire()
        try:
            start = await self._client.create(env_type, task.task_id, instance_id, params)
        except BaseException:
            self._slots.release()
            raise
        return GymEnv(
            self._client,
            self._loop,
            env_type=env_type,
            task_id=task.task_id,
            instance_id=instance_id,
            start=start,
        )

    def _release(self, instance_id: str, env: GymEnv | None) -> None:
        release = self._loop.submit(self._let_go(instance_id, env))
        self._releases.add(release)
        release.add_done_callback(self._releases.discard)

    async def _let_go(self, instance_id: str, env: GymEnv | None) -> None:
        making = self._held.get(instance_id)
        if making is None:
            return
        making.cancel()
        await asyncio.wait({making})
        if self._held.pop(instance_id, None) is None:
            return  # released by somebody else in the meantime
        made = not making.cancelled() and making.exception() is None
        try:
            # Also where it was not made as far as we know: a late answer is an instance too.
            await self._free(instance_id, env)
        finally:
            if made:
                self._slots.release()

    async def _free(self, instance_id: str, env: GymEnv | None) -> None:
        """Twice if need be: a service without leases would keep the instance for ever."""
        release = self._client.release(instance_id) if env is None else env.close_in_loop()
        if await self._freed(instance_id, release):
            return
        await asyncio.sleep(self._settings.release_pause)
        await self._freed(instance_id, self._client.release(instance_id))

    async def _freed(self, instance_id: str, release: Coroutine[Any, Any, None]) -> bool:
        try:
            await asyncio.wait_for(release, self._settings.release_timeout)
        except (EnvError, TimeoutError) as error:
            self.counters["env/release_failed"] += 1
            log.warning("Environment instance %s could not be released: %s", instance_id, error)
            return False
        return True

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._settings.heartbeat)
            try:
                if self._held:
                    await self._client.keep_alive(tuple(self._held))
            except EnvError as error:
                log.debug("heartbeat: %s", error)


def _own_params(task: Task) -> Mapping[str, Any]:
    own = task.metadata.get("env_params") or {}
    if isinstance(own, Mapping):
        return cast(Mapping[str, Any], own)
    raise EnvError(
        f"The task's env_params are {own!r:.200}; they must be an object with the environment's "
        "parameters by name.",
        cause="refused",
    )


def seed_of(run_seed: int, task_id: str) -> int:
    """The same for all episodes of a task, so that they start alike; below 2**31."""
    digest = hashlib.sha256(f"{run_seed} {task_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
