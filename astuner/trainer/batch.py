"""From the groups of a step to mini-batches of weighted samples, and what was left out.

A group is left out when nothing can be learnt from it: no usable episode, no trained
token, or all advantages zero. Leaving out the last kind changes time, not gradients:
its episodes still count in the weights, as zeros would. With dynamic sampling such
groups were to be replaced, so there they do not count. Nothing here awaits anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from astuner.algorithm.assign import credit, teaches, weigh
from astuner.trainer.settings import TrainSettings
from astuner.trainer.totals import Totals
from astuner.types import Episode, Failure, FailureKind, Group, Sample

MASKED = "tokens_masked/"
"""Prefix of metrics and of the source's counters: tokens that are not trained, by reason."""
FAILED = "failed"
"""No usable episode; of tokens, those of failed episodes."""
SINGLE_SURVIVOR = "single_survivor"
"""All but one of its episodes failed, and one cannot be compared."""
NO_VARIANCE = "no_variance"
"""Its rewards are all the same, so no advantage is other than zero."""
NO_TRAINED_TOKENS = "no_trained_tokens"
"""Everything that was sampled is masked (not a target, too long, an empty reply)."""
SURPLUS = "surplus"
"""Refilled groups beyond the size of the batch."""


@dataclass(frozen=True, slots=True)
class Batch:
    groups: tuple[Group, ...]
    """All of this step's, with unusable rewards turned into failures."""
    trained: tuple[Group, ...]
    mini_batches: tuple[tuple[Sample, ...], ...]
    """One optimizer step each: samples with advantages and weights, none without a
    trained token. Empty when there is nothing to learn."""
    skipped_groups: Mapping[str, int]
    masked_tokens: Mapping[str, int]
    """Tokens that are not trained, by `types.MaskReason` or by why their group or
    episode was left out."""

    @property
    def episodes(self) -> tuple[Episode, ...]:
        return tuple(e for g in self.groups for e in g.episodes)

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(s for mini in self.mini_batches for s in mini)

    @property
    def tokens_trained(self) -> int:
        return sum(s.num_trained for s in self.samples)


def make_batch(groups: Sequence[Group], settings: TrainSettings, size: int = 0) -> Batch:
    """Decide what is trained. `size` is the most groups to train on; 0 takes all."""
    groups = [with_checked_rewards(g) for g in groups]
    reasons = why_skipped(groups, settings, size)
    trained = [g for g, reason in zip(groups, reasons, strict=True) if reason is None]
    idle = [g for g, reason in zip(groups, reasons, strict=True) if reason == NO_VARIANCE]
    batches = mini_batches(trained, [] if settings.dynamic_sampling else idle, settings)
    return Batch(
        groups=tuple(groups),
        trained=tuple(trained),
        mini_batches=batches,
        skipped_groups=Counter(reason for reason in reasons if reason),
        masked_tokens=masked_tokens(groups, reasons) + _untaught(trained, batches),
    )


def num_teaching(groups: Sequence[Group], settings: TrainSettings) -> int:
    """How many of the groups there is something to learn from."""
    return why_skipped([with_checked_rewards(g) for g in groups], settings).count(None)


# ---------------------------------------------------------------- which groups


def why_skipped(
    groups: Sequence[Group], settings: TrainSettings, size: int = 0
) -> list[str | None]:
    """For each group why it is left out, or None."""
    reasons: list[str | None] = []
    kept = 0
    for group, samples in zip(groups, credit(groups, settings.estimator), strict=True):
        reason = _why_skipped(group, samples)
        kept += reason is None
        reasons.append(SURPLUS if reason is None and size and kept > size else reason)
    return reasons


def _why_skipped(group: Group, samples: Sequence[Sample]) -> str | None:
    if not group.usable:
        return FAILED
    if not any(s.num_trained for s in samples):
        return NO_TRAINED_TOKENS
    if teaches(samples):
        return None
    alone = len(group.usable) == 1 and len(group.episodes) > 1
    return SINGLE_SURVIVOR if alone else NO_VARIANCE


def with_checked_rewards(group: Group) -> Group:
    """The group with every episode whose reward cannot be trained on marked as failed."""
    return replace(group, episodes=tuple(_with_checked_reward(e) for e in group.episodes))


def _with_checked_reward(episode: Episode) -> Episode:
    wrong = _wrong_reward(episode) if episode.ok else None
    if wrong is None:
        return episode
    return replace(episode, failure=Failure(FailureKind.REWARD, wrong))


def _wrong_reward(episode: Episode) -> str | None:
    if episode.reward is None:
        return "The episode has no reward: neither the workflow nor a judge gave one."
    if not all(math.isfinite(r) for r in (episode.reward, *(episode.turn_rewards or ()))):
        return f"The reward is not finite: {episode.reward}, turns {episode.turn_rewards}."
    if episode.turn_rewards is not None and len(episode.turn_rewards) != len(episode.calls):
        return (
            f"A list of {len(episode.turn_rewards)} rewards for {len(episode.calls)} LLM calls: "
            "give one for each call, or a single number."
        )
    return _wrong_target_reward(episode)


def _wrong_target_reward(episode: Episode) -> str | None:
    calls = Counter(call.target_tag for call in episode.calls)
    for tag, rewards in (episode.target_rewards or {}).items():
        if not all(math.isfinite(r) for r in rewards):
            return f"The reward of target {tag!r} is not finite: {rewards}."
        if len(rewards) not in (1, calls[tag]):
            return (
                f"A list of {len(rewards)} rewards for the {calls[tag]} LLM calls of target "
                f"{tag!r}: give one for each call, or a single number."
            )
    return None


# ---------------------------------------------------------------- the samples


def mini_batches(
    trained: Sequence[Group], idle: Sequence[Group], settings: TrainSettings
) -> tuple[tuple[Sample, ...], ...]:
    """Whole groups dealt out in turn, so that shared prompts stay together."""
    if not trained:
        return ()
    number = min(settings.mini_batch_num, len(trained))
    credited = credit([*trained, *idle], settings.estimator)
    active, passive = credited[: len(trained)], credited[len(trained) :]
    return tuple(_weighed(active[n::number], passive[n::number], settings) for n in range(number))


def _weighed(
    active: Sequence[Sequence[Sample]], passive: Sequence[Sequence[Sample]], settings: TrainSettings
) -> tuple[Sample, ...]:
    """The active samples, weighed together with the passive ones. Each adapter has a batch of
    its own, as if it were alone: a group that teaches it nothing is passive for it."""
    weighed: dict[int, Sample] = {}
    for adapter in sorted({settings.adapter_of(s) for group in active for s in group}):
        own = [[s for s in group if settings.adapter_of(s) == adapter] for group in active]
        rest = [s for group in passive for s in group if settings.adapter_of(s) == adapter]
        learnt = [s for group in own if teaches(group) for s in group]
        if not settings.dynamic_sampling:
            rest = [s for group in own if not teaches(group) for s in group] + rest
        results = weigh([*learnt, *rest], settings.aggregation, settings.max_response_length)
        weighed |= {id(s): result for s, result in zip(learnt, results, strict=False)}
    everything = (s for group in active for s in group)
    return tuple(weighed[id(s)] for s in everything if id(s) in weighed and s.num_trained)


# ---------------------------------------------------------------- the accounts


def masked_tokens(groups: Sequence[Group], reasons: Sequence[str | None]) -> Counter[str]:
    """Sampled tokens of what was left out, and masked tokens of what was trained."""
    tokens: Counter[str] = Counter()
    for group, reason in zip(groups, reasons, strict=True):
        for episode in group.episodes:
            if episode not in group.usable:
                tokens[FAILED] += sampled_tokens(episode)
            elif reason is not None:
                tokens[reason] += sampled_tokens(episode)
            else:
                for sample in episode.samples:
                    tokens.update({str(k): n for k, n in sample.masked.items()})
    return +tokens


def _untaught(trained: Sequence[Group], batches: Sequence[Sequence[Sample]]) -> Counter[str]:
    """Tokens of adapters that a group taught nothing, though it taught another one."""
    there = sum(s.num_trained for g in trained for e in g.usable for s in e.samples)
    return Counter({NO_VARIANCE: there - sum(s.num_trained for b in batches for s in b)})


def sampled_tokens(episode: Episode) -> int:
    return sum(len(call.completion_ids) for call in episode.calls)


def account(batch: Batch, counters: Mapping[str, float], seconds: float) -> Totals:
    """What one step adds to the totals, with the tokens that the source dropped."""
    masked = Counter(batch.masked_tokens)
    sampled = sum(sampled_tokens(e) for e in batch.episodes)
    for name, count in counters.items():
        if name.startswith(MASKED):
            masked[name.removeprefix(MASKED)] += int(count)
            sampled += int(count)
    return Totals(
        tokens_sampled=sampled,
        tokens_trained=batch.tokens_trained,
        tokens_masked_by_reason=dict(masked),
        episodes=len(batch.episodes),
        episodes_failed=sum(not e.ok for e in batch.episodes),
        steps_skipped=int(not batch.mini_batches),
        train_seconds=seconds,
    )
