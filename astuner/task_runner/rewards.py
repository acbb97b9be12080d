"""What an episode is worth: the workflow's own reward, or the judge's.

Turns a reward that was returned into a `Score`, or into a typed Failure: NaN,
infinities and per-turn lists of the wrong length are failures of the episode, never of
the run. It calls nothing; the runner does.
"""

from __future__ import annotations

from dataclasses import dataclass

from astuner.errors import RewardError
from astuner.task_judge import Verdict, to_verdict
from astuner.types import Failure, FailureKind, WorkflowOutput


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one episode, or why there is none."""

    reward: float | None = None
    """The sum of `turn_rewards` where there are any."""
    turn_rewards: tuple[float, ...] | None = None
    is_success: bool | None = None
    failure: Failure | None = None


def bad_reward(message: str) -> Score:
    return Score(failure=Failure(FailureKind.REWARD, message))


def own_score(output: WorkflowOutput, num_calls: int) -> Score | None:
    """The reward that the workflow returned itself; None when it left it to the judge."""
    if output.reward is None:
        return None
    try:
        verdict = to_verdict(output.reward, output.is_success)
    except RewardError as error:
        return bad_reward(f"The workflow's reward cannot be used. {error}")
    return checked(verdict, num_calls, "workflow")


def checked(verdict: Verdict, num_calls: int, who: str) -> Score:
    """The verdict as a score, if its per-turn rewards are one for each LLM call."""
    turns = verdict.turn_rewards
    if turns is not None and len(turns) != num_calls:
        return bad_reward(
            f"The {who} returned {len(turns)} per-turn rewards, but the episode made {num_calls} "
            "LLM calls. Return one reward for each call in order, or a single number."
        )
    return Score(verdict.reward, turns, verdict.is_success)
