"""What the runner needs of environments, and what their failures become.

An episode's environment exists before the workflow starts and is given back after the
judge, whatever happens. A failure of it is the episode's, also where the workflow
swallowed it; a step after the end is the workflow's own mistake.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from astuner.env import GymEnv
from astuner.errors import AstunerError, EnvError
from astuner.task_runner.live import LiveEpisode
from astuner.task_runner.rewards import Score, own_score
from astuner.types import Failure, FailureKind, Task, WorkflowOutput, WorkflowTask


class Environments(Protocol):
    """Gives each episode an environment; `astuner.env.EnvPool` does."""

    @property
    def counters(self) -> Counter[str]:
        """What happened, by name; cleared by who reads it."""
        ...

    async def open(self, task: Task, episode_id: str) -> GymEnv: ...
    def release(self, env: GymEnv) -> None:
        """Does not wait."""
        ...


def show_start(workflow_task: WorkflowTask, env: GymEnv) -> None:
    """Hand the environment to the workflow. A task that says nothing of its own shows what the
    environment shows at first."""
    workflow_task.gym_env = env
    task = workflow_task.task
    if not task.main_query and not task.init_messages:
        task.main_query = env.initial_text
        task.init_messages = env.initial_messages


def not_opened(error: AstunerError) -> Failure:
    """There is no environment, so the workflow was not run."""
    return Failure(
        FailureKind.ENVIRONMENT,
        f"The environment could not be made. {error}",
        error.traceback if isinstance(error, EnvError) else "",
        retriable=isinstance(error, EnvError) and error.retriable,
    )


def or_environment(
    workflow_task: WorkflowTask,
    raised: BaseException | None,
    result: WorkflowOutput | Failure,
) -> WorkflowOutput | Failure:
    """The workflow's result, unless the environment is to blame for it: also where the workflow
    swallowed that. `raised` is what left `execute`."""
    error = _trouble_of(workflow_task, raised)
    if error is None:
        return result
    if isinstance(result, WorkflowOutput):
        return _environment_failed(error, "the workflow returned all the same.")
    if result.kind is FailureKind.ENGINE:
        return result
    return _environment_failed(error, result.message)


def _trouble_of(workflow_task: WorkflowTask, raised: BaseException | None) -> EnvError | None:
    """The environment's failure in this episode, if there was one."""
    env = workflow_task.gym_env
    if isinstance(env, GymEnv) and env.trouble is not None:
        return env.trouble
    return raised if isinstance(raised, EnvError) and raised.cause != "misuse" else None


def _environment_failed(error: EnvError, then: str) -> Failure:
    message = f"{error} Then: {then}"
    return Failure(FailureKind.ENVIRONMENT, message, error.traceback, retriable=error.retriable)


async def environment_score(
    workflow_task: WorkflowTask, output: WorkflowOutput, live: LiveEpisode
) -> Score:
    """The environment's own score, of an episode whose reward nobody else gives."""
    live.enter("the environment's score")
    try:
        reward = await workflow_task.gym_env.evaluate()
    except EnvError as error:
        return Score(failure=_environment_failed(error, "the episode has no reward."))
    score = own_score(output.model_copy(update={"reward": reward}), 0)
    return score or Score()
