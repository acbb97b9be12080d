"""What an episode is worth: the workflow's own reward, or the judge's.

Turns what `execute` returned and what the judge said into one `Score`, or into a
typed Failure. NaN, infinities and per-turn lists of the wrong length are failures of
the episode, never of the run. It calls nothing; the runner does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from astuner.types import Failure, FailureKind, WorkflowOutput


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one episode."""

    reward: float | None = None
    """The sum of `turn_rewards` where there are any."""
    turn_rewards: tuple[float, ...] | None = None
    is_success: bool | None = None
    failure: Failure | None = None


def bad_reward(message: str) -> Score:
    return Score(failure=Failure(FailureKind.REWARD, message))


def own_score(output: WorkflowOutput, num_calls: int) -> Score | None:
    """The reward that the workflow returned itself; None when it left it to the judge."""
    reward = output.reward
    if reward is None:
        return None
    if isinstance(reward, list):
        return turn_score(reward, num_calls, output.is_success, "The workflow")
    if not math.isfinite(reward):
        return bad_reward(f"The workflow returned the reward {reward}; it must be a finite number.")
    return Score(reward, None, output.is_success)


def turn_score(
    rewards: Sequence[float], num_calls: int, is_success: bool | None, who: str
) -> Score:
    """One reward for each LLM call, in order of the calls."""
    if len(rewards) != num_calls:
        return bad_reward(
            f"{who} returned {len(rewards)} per-turn rewards, but the episode made {num_calls} "
            "LLM calls. Return one reward for each call in order, or a single number."
        )
    bad = [(i, value) for i, value in enumerate(rewards) if not math.isfinite(value)]
    if bad:
        index, value = bad[0]
        return bad_reward(
            f"{who} returned the reward {value} for turn {index}; it must be a finite number."
        )
    return Score(math.fsum(rewards), tuple(rewards), is_success)
