"""`GymEnv`: what a workflow sees as `workflow_task.gym_env`.

Gymnasium's API over one instance of an environment: `await gym_env.reset()`,
`await gym_env.step(action)`; `gym_env.sync` has the same methods without await. It works
from any thread and event loop, one call at a time. The instance exists before the workflow
starts and is freed after it by whoever made it, so `close` is optional. A failure of the
environment is kept in `trouble`, so that a workflow which swallows it is not trusted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from time import monotonic
from typing import Any, TypeVar

from astuner.env.loop import EnvLoop
from astuner.env.protocol import (
    Action,
    Asked,
    EnvClient,
    Info,
    Observation,
    Start,
    messages_of,
    text_of,
)
from astuner.errors import EnvError

T = TypeVar("T")
Step = tuple[Observation, float, bool, bool, Info]


class GymEnv:
    """One instance of an environment, for one episode."""

    def __init__(
        self,
        client: EnvClient,
        loop: EnvLoop,
        *,
        env_type: str,
        task_id: str,
        instance_id: str,
        start: Start,
    ) -> None:
        self.env_type = env_type
        self.task_id = task_id
        self.instance_id = instance_id
        self.trouble: EnvError | None = None
        """The first failure of the environment; misuse by the workflow is none."""
        self.steps = 0
        """Steps taken so far."""
        self.seconds = 0.0
        """Time spent waiting for the environment."""
        self._client = client
        self._loop = loop
        self._start = start
        self._fresh = True
        self._started = False
        self._done = False
        self._closed = False
        self._turn = asyncio.Lock()
        """Two agents in one world act one after the other."""
        self._score: float | EnvError | None = None
        """What `evaluate` gives after the workflow's `close`."""
        self.sync = SyncGymEnv(self, loop)
        """The same methods for code without await."""

    @property
    def initial_observation(self) -> Observation:
        """What the environment showed when it was made: the first `reset` gives it again."""
        return self._start.observation

    @property
    def initial_messages(self) -> list[dict[str, Any]]:
        return messages_of(self._start.observation)

    @property
    def initial_text(self) -> str:
        return text_of(self._start.observation)

    async def reset(self, *, seed: int | None = None) -> tuple[Observation, Info]:
        """Start an episode: (observation, info). The first one without a seed costs nothing, for
        the instance was made in that state. Raises EnvError."""
        return await self._loop.run(self._in_turn(self._reset(seed)))

    async def step(self, action: Action, *, params: Mapping[str, Any] | None = None) -> Step:
        """(observation, reward, terminated, truncated, info). `action` is a text, a chat message
        or what the environment takes. Raises EnvError; before `reset` or after the end too."""
        return await self._loop.run(self._in_turn(self._step(action, Asked(params or {}))))

    async def evaluate(
        self, params: Mapping[str, Any] | None = None, *, messages: Any = None
    ) -> float:
        """The environment's own score of the episode; by default the sum of its rewards.
        `params` and `messages` are for environments that take them."""
        asked = Asked(params or {}, messages or {})
        return await self._loop.run(self._in_turn(self._evaluate(asked)))

    async def get_info(
        self, params: Mapping[str, Any] | None = None, *, messages: Any = None
    ) -> Any:
        """Whatever else it tells, e.g. its tools."""
        asked = Asked(params or {}, messages or {})
        return await self._loop.run(self._in_turn(self._info(asked)))

    async def close(self) -> None:
        """Free the instance now rather than after the episode. Its score is read before, and
        `evaluate` still gives it afterwards."""
        await self._loop.run(self._in_turn(self._close()))

    # ---------------------------------------------------------------- in the environments' loop

    async def _in_turn(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            async with self._turn:
                return await work
        finally:
            work.close()  # where it never began

    async def _reset(self, seed: int | None) -> tuple[Observation, Info]:
        self._check_open()
        if not (self._fresh and seed is None):
            self._start = await self._watched(self._client.reset(self.instance_id, seed))
        self._fresh, self._started, self._done = False, True, False
        return self._start.observation, self._start.info

    async def _step(self, action: Action, asked: Asked) -> Step:
        self._check_open()
        if not self._started:
            raise EnvError("Call gym_env.reset() before the first step().", cause="misuse")
        if self._done:
            raise EnvError(
                "The environment's episode has ended (terminated or truncated): leave the loop, or "
                "call gym_env.reset() before the next step().",
                cause="misuse",
            )
        self.steps += 1
        result = await self._watched(self._client.step(self.instance_id, action, asked))
        self._done = result.done
        return result.observation, result.reward, result.terminated, result.truncated, result.info

    async def _evaluate(self, asked: Asked) -> float:
        if isinstance(self._score, EnvError):
            self.trouble = self.trouble or self._score
            raise self._score
        if self._score is not None:
            return self._score
        self._check_open()
        return await self._watched(self._client.evaluate(self.instance_id, asked))

    async def _info(self, asked: Asked) -> Any:
        self._check_open()
        return await self._watched(self._client.info(self.instance_id, asked))

    async def _close(self) -> None:
        if not self._closed and self.trouble is None:
            try:
                self._score = await self._client.evaluate(self.instance_id)
            except EnvError as error:
                self._score = error  # of no interest to an episode that is scored otherwise
        await self.close_in_loop()

    async def close_in_loop(self) -> None:
        """Free the instance, without its score: the episode is over."""
        if not self._closed:
            self._closed = True
            await self._client.release(self.instance_id)

    def _check_open(self) -> None:
        if self._closed:
            raise EnvError("gym_env is closed: its episode is over.", cause="misuse")

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        began = monotonic()
        try:
            return await work
        except EnvError as error:
            if error.cause != "misuse" and self.trouble is None:
                self.trouble = error
            raise
        finally:
            self.seconds += monotonic() - began


class SyncGymEnv:
    """The methods of a GymEnv for code without await; they block the calling thread."""

    def __init__(self, env: GymEnv, loop: EnvLoop) -> None:
        self._env = env
        self._loop = loop

    def reset(self, *, seed: int | None = None) -> tuple[Observation, Info]:
        return self._loop.wait(self._env.reset(seed=seed))

    def step(self, action: Action, *, params: Mapping[str, Any] | None = None) -> Step:
        return self._loop.wait(self._env.step(action, params=params))

    def evaluate(self, params: Mapping[str, Any] | None = None, *, messages: Any = None) -> float:
        return self._loop.wait(self._env.evaluate(params, messages=messages))

    def get_info(self, params: Mapping[str, Any] | None = None, *, messages: Any = None) -> Any:
        return self._loop.wait(self._env.get_info(params, messages=messages))

    def close(self) -> None:
        self._loop.wait(self._env.close())
