"""Environments in this process: an EnvClient over `TextEnv`s, each in a thread of its own.

This module is the named boundary for an environment's code: whatever it raises becomes an
EnvError with its traceback, and one that does not answer in time is given up with its
thread. Gymnasium's rules are kept: a step before reset or after the end is an error. The
same object stands behind the HTTP server.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from astuner.env.protocol import (
    NOTHING,
    Action,
    Asked,
    EnvMaker,
    Start,
    StepResult,
    TextEnv,
    as_observation,
    finite_score,
)
from astuner.env.worker import Worker
from astuner.errors import AstunerError, EnvError

T = TypeVar("T")
log = logging.getLogger(__name__)
CLOSE_TIMEOUT = 5.0
"""Seconds an environment gets to close; then its thread is left behind."""
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(slots=True)
class _Instance:
    env_type: str
    task_id: str
    worker: Worker
    env: TextEnv | None = None
    total: float = 0.0
    """The sum of the rewards since the last reset."""
    done: bool = False


class LocalEnvs:
    """Instances in this process. All methods belong to one event loop."""

    def __init__(
        self,
        find: Callable[[str], EnvMaker],
        *,
        create_timeout: float = 60.0,
        step_timeout: float = 60.0,
    ) -> None:
        """`find` gives an environment's maker by its name, or raises an AstunerError."""
        self._find = find
        self._create_timeout = create_timeout
        self._step_timeout = step_timeout
        self._instances: dict[str, _Instance] = {}
        self._makers: dict[str, EnvMaker] = {}
        self._finding = threading.Lock()

    @property
    def instances(self) -> Mapping[str, tuple[str, str]]:
        """Instance id -> environment and task, of all that exist."""
        return {name: (made.env_type, made.task_id) for name, made in self._instances.items()}

    async def create(
        self, env_type: str, task_id: str, instance_id: str, params: Mapping[str, Any]
    ) -> Start:
        """Make an instance and reset it, with `params["seed"]` if there is one."""
        if instance_id in self._instances:
            raise EnvError(f"There is an instance {instance_id} already.", cause="refused")
        instance = _Instance(env_type, task_id, _thread(f"environment {instance_id}"))
        self._instances[instance_id] = instance

        def work() -> Start:
            instance.env = self._maker(env_type)(task_id, dict(params))
            return _started(instance.env.reset(seed=params.get("seed")))

        try:
            return await self._do(instance_id, "create", work, self._create_timeout)
        except BaseException:
            if self._instances.get(instance_id) is instance:  # nobody else's by now
                await self.release(instance_id)
            raise

    async def reset(self, instance_id: str, seed: int | None) -> Start:
        instance = self._instance(instance_id)
        start = await self._do(
            instance_id, "reset", lambda: _started(_env(instance).reset(seed=seed))
        )
        instance.total, instance.done = 0.0, False
        return start

    async def step(self, instance_id: str, action: Action, asked: Asked = NOTHING) -> StepResult:
        instance = self._instance(instance_id)
        if instance.done:
            raise EnvError(
                "The environment's episode has ended: reset it before the next step.",
                cause="misuse",
            )

        def work() -> StepResult:
            return _stepped(_called(_env(instance).step, (action,), (dict(asked.params),)))

        result = await self._do(instance_id, "step", work)
        instance.total += result.reward
        instance.done = result.done
        return result

    async def evaluate(self, instance_id: str, asked: Asked = NOTHING) -> float:
        instance = self._instance(instance_id)
        own = getattr(instance.env, "evaluate", None)
        if own is None:
            return instance.total
        return await self._do(
            instance_id, "evaluate", lambda: finite_score(_told(own, asked), "score")
        )

    async def info(self, instance_id: str, asked: Asked = NOTHING) -> Any:
        own = getattr(self._instance(instance_id).env, "get_info", None)
        if own is None:
            return None
        return await self._do(instance_id, "get_info", lambda: _told(own, asked))

    async def release(self, instance_id: str) -> None:
        """Its thread closes it after what it is doing; that is not waited for very long."""
        instance = self._instances.pop(instance_id, None)
        if instance is not None:
            closing = asyncio.wrap_future(instance.worker.submit(lambda: _close(instance)))
            instance.worker.close()
            done, _ = await asyncio.wait({closing}, timeout=min(CLOSE_TIMEOUT, self._step_timeout))
            if not done:
                log.warning("Environment instance %s still closes; left behind.", instance_id)

    async def task_ids(self, env_type: str, split: str) -> list[str]:
        def work() -> list[str]:
            own = getattr(self._maker(env_type), "task_ids", None)
            return [] if own is None else [str(task_id) for task_id in own(split)]

        worker = _thread(f"tasks of {env_type}")
        try:
            return await _within(worker.submit(work), self._create_timeout, "task_ids")
        finally:
            worker.close()

    async def keep_alive(self, instance_ids: Sequence[str]) -> None:
        """They live as long as this object."""

    async def aclose(self) -> None:
        await asyncio.gather(*(self.release(name) for name in tuple(self._instances)))

    def _maker(self, env_type: str) -> EnvMaker:
        """In an instance's thread: finding it may import, and is done once."""
        with self._finding:
            if env_type not in self._makers:
                self._makers[env_type] = self._find(env_type)
            return self._makers[env_type]

    def _instance(self, instance_id: str) -> _Instance:
        if instance_id not in self._instances:
            raise EnvError(f"Instance {instance_id} not found!", cause="gone")
        return self._instances[instance_id]

    async def _do(
        self, instance_id: str, what: str, work: Callable[[], T], timeout: float | None = None
    ) -> T:
        worker = self._instances[instance_id].worker
        return await _within(worker.submit(work), timeout or self._step_timeout, what)


async def _within(future: Any, timeout: float, what: str) -> Any:
    """The boundary: what the environment's code raises, or that it does not answer."""
    waiter = asyncio.wrap_future(future)
    try:
        done, _ = await asyncio.wait({waiter}, timeout=timeout)
        if done:
            return waiter.result()
        raise EnvError(f"The environment's {what} took longer than {timeout:g} s.", cause="timeout")
    except asyncio.CancelledError:
        raise
    except AstunerError:
        raise
    except BaseException as error:
        raise EnvError(
            f"The environment's {what} raised {type(error).__name__}: {error}",
            cause="crashed",
            traceback="".join(traceback.format_exception(error)),
        ) from None
    finally:
        waiter.cancel()


def _thread(name: str) -> Worker:
    try:
        return Worker(name)
    except RuntimeError as error:  # the system's limit of threads
        raise EnvError(
            f"No thread for {name}: {error}. Set a lower env.max_instances.", cause="unavailable"
        ) from None


def _env(instance: _Instance) -> TextEnv:
    if instance.env is None:
        raise EnvError("The environment was never made.", cause="gone")
    return instance.env


def _told(own: Callable[..., Any], asked: Asked) -> Any:
    return _called(own, (), (dict(asked.params), asked.messages))


def _called(own: Callable[..., Any], given: tuple[Any, ...], offered: tuple[Any, ...]) -> Any:
    """What the environment's method returns, called with as much of what is offered as it takes
    by position."""
    kinds = [parameter.kind for parameter in inspect.signature(own).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return own(*given, *offered)
    takes = sum(kind in _BY_POSITION for kind in kinds) - len(given)
    return own(*given, *offered[: max(0, takes)])


def _started(reply: object) -> Start:
    match reply:
        case (observation, dict() as info):
            shown = as_observation(observation, "first observation")
            return Start(shown, dict(info))  # pyright: ignore[reportUnknownArgumentType]
        case _:
            raise TypeError(f"reset() must return (observation, info), but gave {reply!r:.200}")


def _stepped(reply: object) -> StepResult:
    match reply:
        case (observation, reward, terminated, truncated, dict() as info):
            return StepResult(
                as_observation(observation, "observation"),
                finite_score(reward, "reward"),
                bool(terminated),
                bool(truncated),
                dict(info),  # pyright: ignore[reportUnknownArgumentType]
            )
        case _:
            raise TypeError(
                "step() must return (observation, reward, terminated, truncated, info), but gave "
                f"{reply!r:.200}"
            )


def _close(instance: _Instance) -> None:
    """The boundary once more: one that cannot even close is told, and forgotten."""
    close = getattr(instance.env, "close", None)
    try:
        if close is not None:
            close()
    except Exception as error:
        log.warning("An environment %r raised while closing: %r", instance.env_type, error)
