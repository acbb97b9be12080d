"""What an episode is worth: the workflow's own reward, or the judge's.

Turns a reward that was returned into a `Score`, or into a typed Failure: NaN,
infinities, per-turn lists of the wrong length and targets that nobody knows are failures
of the episode, never of the run. It calls nothing; the runner does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

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
    target_rewards: Mapping[str, tuple[float, ...]] | None = None
    listed: frozenset[str] = frozenset()
    """As in `Verdict`."""

    def of_target(self, tag: str) -> float:
        """What the calls of this target brought in all; 0 where there is no reward."""
        if self.target_rewards is None:
            return self.reward or 0.0
        return sum(self.target_rewards.get(tag, ()))


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
    own = verdict.target_rewards
    return Score(verdict.reward, turns, verdict.is_success, None, own, verdict.listed)


def checked_targets(
    score: Score,
    tags: Sequence[str],
    trained: frozenset[str] | None,
    declared: Collection[str] = (),
) -> Score:
    """A score by target, if it fits the calls: `tags` are their targets in order.

    Every target that it names must have made a call or be one of `declared`, a list must
    have one entry for each of the target's calls, and each target that is `trained` (None:
    all) and made a call must have a reward. The scalar becomes the mean over the trained.
    """
    rewards, calls = score.target_rewards, Counter(tags)
    if rewards is None or score.failure is not None:
        return score
    if unknown := sorted(set(rewards) - set(calls) - set(declared)):
        return bad_reward(
            f"The reward names the target {unknown[0]!r}, but the episode's calls are of "
            f"{sorted(calls)}. The names are the target_tag of tuner.as_...(target_tag=...)."
        )
    for tag, of_target in rewards.items():
        if len(of_target) != calls[tag] and tag in score.listed:
            return bad_reward(
                f"The reward of target {tag!r} is a list of {len(of_target)}, but the target made "
                f"{calls[tag]} LLM calls. Give one for each of its calls in order, or one number."
            )
    wanted = {tag for tag in calls if trained is None or tag in trained}
    if missing := sorted(wanted - set(rewards)):
        return bad_reward(
            f"The reward names {sorted(rewards)}, but not the target {missing[0]!r}, which made "
            f"{calls[missing[0]]} LLM calls and is trained."
        )
    counted = [tag for tag in rewards if trained is None or tag in trained] or list(rewards)
    return replace(score, reward=fmean(sum(rewards[tag]) for tag in counted))
