"""Failures of a workflow, in words the user can act on.

Each function makes one `Failure` from what was seen. Nothing is raised, logged or
decided here beyond whose fault it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from astuner.task_runner.stacks import raised_at, user_traceback
from astuner.types import Call, Failure, FailureKind

if TYPE_CHECKING:
    from astuner.model_tuner.session import Problem


def workflow_raised(name: str, error: BaseException) -> Failure:
    """`execute` raised."""
    at = f" at {place}" if (place := raised_at(error)) else ""
    message = f"{name} raised {type(error).__name__}{at}: {error}"
    return Failure(FailureKind.WORKFLOW, message, user_traceback(error))


def wrong_type(name: str, output: object) -> Failure:
    """`execute` returned something else than a WorkflowOutput."""
    shown = "None (is a return missing?)" if output is None else f"{output!r:.200}"
    kind = "" if output is None else f" of type {type(output).__name__}"
    return Failure(
        FailureKind.WORKFLOW,
        f"{name} returned {shown}{kind}; it must return a WorkflowOutput, "
        "e.g. WorkflowOutput(reward=1.0).",
    )


def targets_widened(name: str, now: frozenset[str] | None, declared: frozenset[str]) -> Failure:
    """`execute` changed its trainable targets to some that the class does not name."""
    return Failure(
        FailureKind.WORKFLOW,
        f"{name} set self.trainable_targets to {None if now is None else sorted(now)}, but the "
        f"class declares {sorted(declared)}, and by that it was decided who answers. Declare every "
        "target in the class; execute may only leave some of them out.",
    )


def overdue(timeout: float, where: str, *, calls_in_flight: int, left_behind: bool) -> Failure:
    """`execute` did not return in time; `where` is where it stood."""
    message = f"The workflow did not return within rollout.episode_timeout = {timeout:g} s."
    if calls_in_flight:
        message += f" {calls_in_flight} of its LLM calls were still being answered."
    if left_behind:
        message += " It blocks its thread, which was left behind."
    return Failure(FailureKind.TIMEOUT, message, where)


def unrecovered(problems: Sequence[Problem], calls: Sequence[Call]) -> Problem | None:
    """The engine's last failure after which the same agent had no call answered that began
    later (the client's retry). What others were answered meanwhile does not bring it back."""
    lost = [p for p in problems if p.kind is not FailureKind.WORKFLOW and not _retried(p, calls)]
    return lost[-1] if lost else None


def _retried(problem: Problem, calls: Sequence[Call]) -> bool:
    agent = problem.agent_name, problem.target_tag
    return any((c.agent_name, c.target_tag) == agent and c.started_at >= problem.at for c in calls)


def engine_failed(problem: Problem, then: str, traceback: str = "") -> Failure:
    """Worth another attempt, whatever the workflow made of it."""
    message = f"The engine failed a call: {problem.message} Then: {then}"
    return Failure(FailureKind.ENGINE, message, traceback, retriable=True)
