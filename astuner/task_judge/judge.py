"""The Judge protocol, and every shape a user may write one in.

`wrap_judge` makes a Judge of a class, an instance or a function, sync or async.
Sync code runs in a daemon thread of its own, so that a judge that blocks or never
returns holds up neither the event loop nor the end of the process. No exception
is caught here: the runner has the one boundary for what judges raise.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from typing import Any, Protocol

from astuner.config.schema import TaskJudgeConfig
from astuner.errors import ConfigError, LoadingError
from astuner.loading import load_object
from astuner.task_judge.verdict import Verdict, to_verdict
from astuner.types import WorkflowOutput, WorkflowTask

Reward = float | list[float] | dict[str, float | list[float]]
Outcome = Reward | tuple[Reward, bool]


class Judge(Protocol):
    """Gives the reward of one episode."""

    async def compute_reward(self, task: WorkflowTask, output: WorkflowOutput) -> Outcome:
        """A number, one number for each LLM call, or a dict of either by target tag; each of
        them also as (reward, is_success)."""
        ...


JUDGES: dict[str, str] = {
    "exact_match": "astuner.task_judge.exact:ExactMatch",
    "number_match": "astuner.task_judge.number:NumberMatch",
    "math_verify": "astuner.task_judge.maths:MathVerify",
    "reasoning_gym": "astuner.task_judge.gym:ReasoningGym",
    "regex": "astuner.task_judge.regex:RegexMatch",
    "llm": "astuner.task_judge.llm:LlmJudge",
}
"""Ready judges; each is called with the TaskJudgeConfig."""


def make_judge(config: TaskJudgeConfig) -> Judge | None:
    """The configured judge, or None where the workflow returns its own reward.

    Raises ConfigError, LoadingError, or MissingDependency.
    """
    if config.judge_type == "none":
        return None
    if config.judge_type == "customized_protocol":
        if not config.judge_protocol:
            raise ConfigError(
                "astuner.task_judge.judge_type is customized_protocol, which needs "
                "astuner.task_judge.judge_protocol: package.module->Name."
            )
        return wrap_judge(load_object(config.judge_protocol, "judge"))
    if config.judge_type not in JUDGES:
        choices = ", ".join(["none", "customized_protocol", *JUDGES])
        raise ConfigError(
            f"astuner.task_judge.judge_type is {config.judge_type!r}, but must be one of {choices}."
        )
    module, _, attribute = JUDGES[config.judge_type].partition(":")
    return wrap_judge(getattr(import_module(module), attribute)(config))


def wrap_judge(obj: Any) -> Judge:
    """A Judge from an instance or class with `compute_reward(task, output)`, or from a
    function of those two; sync or async. Raises LoadingError for anything else."""
    if isinstance(obj, _Wrapped):
        return obj
    if isinstance(obj, str):
        return wrap_judge(load_object(obj, "judge"))
    name = getattr(obj, "__qualname__", type(obj).__qualname__)
    if isinstance(obj, type):
        obj = _instance(obj)
    compute = getattr(obj, "compute_reward", obj)
    if not callable(compute):
        raise LoadingError(
            f"{name} is no judge: it needs a method compute_reward(task, output), "
            "or be a function of task and output."
        )
    try:
        inspect.signature(compute).bind(None, None)
    except TypeError as error:
        raise LoadingError(
            f"The judge {name} must take (task, output), but its signature is "
            f"{inspect.signature(compute)}: {error}."
        ) from None
    return _Wrapped(compute)


async def score(judge: Judge, task: WorkflowTask, output: WorkflowOutput) -> Verdict:
    """Ask the judge and check what it says.

    Raises RewardError for NaN, infinity or a wrong type, and whatever the judge raises.
    """
    return to_verdict(await judge.compute_reward(task, output))


class _Wrapped:
    """Any callable of (task, output) as a Judge."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        self._compute = compute
        call = getattr(compute, "__call__", None)  # noqa: B004 - its code is wanted
        self._is_async = inspect.iscoroutinefunction(compute) or inspect.iscoroutinefunction(call)

    async def compute_reward(self, task: WorkflowTask, output: WorkflowOutput) -> Outcome:
        if self._is_async:
            return await self._compute(task, output)
        outcome = await _in_thread(self._compute, task, output)
        return await outcome if inspect.isawaitable(outcome) else outcome


def _instance(cls: type) -> Any:
    if not hasattr(cls, "compute_reward"):
        raise LoadingError(f"The class {cls.__qualname__} has no method compute_reward.")
    try:
        return cls()
    except TypeError as error:
        raise LoadingError(
            f"The judge class {cls.__qualname__} must be made without arguments: {error}. "
            "Give an instance, or defaults to its __init__."
        ) from error


async def _in_thread(compute: Callable[..., Any], *args: Any) -> Any:
    """Like `asyncio.to_thread`, but in a daemon thread of its own: the shared pool is
    small, and waits at exit for threads that never return."""
    done: Future[Any] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            done.set_result(context.run(compute, *args))
        except BaseException as error:  # handed over whole; the awaiting side raises it
            done.set_exception(error)

    done.set_running_or_notify_cancel()
    threading.Thread(target=run, name="astuner-judge", daemon=True).start()
    return await asyncio.wrap_future(done)
