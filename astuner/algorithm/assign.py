"""Puts advantages and weights on samples: from Groups to what `Policy` trains on.

`credit` turns the rewards of whole groups into per-token advantages, `weigh` turns
an aggregation into per-token weights; both return new samples. Where episodes reward
their targets apart, each target's group is those of its episodes in which it made a
call. Which groups are worth training on is the trainer's decision, not made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from astuner.algorithm.advantages import Estimator, Rewards
from astuner.algorithm.aggregation import Aggregation
from astuner.types import Episode, Group, Sample

NEGLIGIBLE = 1e-8
"""Advantages smaller than this are rounding errors of zero."""


def episode_rewards(episode: Episode) -> Rewards:
    """Its rewards turn by turn [S], or [1] when it has a single one."""
    if episode.turn_rewards is not None:
        return np.asarray(episode.turn_rewards, np.float64)
    return np.asarray([episode.reward], np.float64)


def credit(groups: Sequence[Group], estimator: Estimator) -> list[list[Sample]]:
    """The samples of each group's usable episodes, with `advantages` set. Whether targets have
    baselines of their own is decided group by group, so none depends on its neighbours' form.

    An episode whose turn rewards do not have one entry per call must not get here.
    """
    apart = [any(e.target_rewards is not None for e in group.usable) for group in groups]
    credited: dict[int, list[Sample]] = {}
    for how, is_apart in ((_credit_whole, False), (_credit_by_target, True)):
        places = [i for i, a in enumerate(apart) if a is is_apart]
        if places:
            samples = how([groups[i] for i in places], estimator)
            credited |= dict(zip(places, samples, strict=True))
    return [credited[i] for i in range(len(groups))]


def _credit_whole(groups: Sequence[Group], estimator: Estimator) -> list[list[Sample]]:
    """Every call of an episode has its reward."""
    advantages = estimator([[episode_rewards(e) for e in g.usable] for g in groups])
    return [
        [
            with_advantages(sample, of_episode)
            for episode, of_episode in zip(group.usable, of_group, strict=True)
            for sample in episode.samples
        ]
        for group, of_group in zip(groups, advantages, strict=True)
    ]


def _credit_by_target(groups: Sequence[Group], estimator: Estimator) -> list[list[Sample]]:
    """Each target has baselines, and a batch, of its own."""
    usable = [group.usable for group in groups]
    tags = sorted({s.target_tag for episodes in usable for e in episodes for s in e.samples})
    credited: dict[int, Sample] = {}
    for tag in tags:
        played = [[e for e in episodes if _played(e, tag)] for episodes in usable]
        advantages = estimator([[target_rewards(e, tag) for e in episodes] for episodes in played])
        for episodes, of_group in zip(played, advantages, strict=True):
            for episode, of_episode in zip(episodes, of_group, strict=True):
                whole = len(of_episode) == 1
                of_calls = of_episode if whole else of_episode[target_turns(episode, tag)]
                for sample in (s for s in episode.samples if s.target_tag == tag):
                    credited[id(sample)] = with_advantages(sample, of_calls)
    return [[credited[id(s)] for e in episodes for s in e.samples] for episodes in usable]


def _played(episode: Episode, tag: str) -> bool:
    return any(s.target_tag == tag for s in episode.samples)


def target_rewards(episode: Episode, tag: str) -> Rewards:
    """The target's rewards over its own calls [S], or [1] for a single one; those of the whole
    episode where it has no others. A target without a reward (not trained) gets 0."""
    if episode.target_rewards is None:
        return episode_rewards(episode)
    return np.asarray(episode.target_rewards.get(tag, (0.0,)), np.float64)


def target_turns(episode: Episode, tag: str) -> NDArray[np.int32]:
    """For each call of the episode, which entry of the target's rewards is meant, [calls]."""
    if episode.target_rewards is None:
        return np.arange(len(episode.calls), dtype=np.int32)
    own = np.asarray([call.target_tag == tag for call in episode.calls])
    return (np.cumsum(own) - 1).clip(0).astype(np.int32)


def with_advantages(sample: Sample, advantages_S: Rewards) -> Sample:
    """Each trained token gets its turn's advantage, or the only one there is; others 0."""
    own = advantages_S if len(advantages_S) == 1 else advantages_S[sample.turns]
    advantages_T = np.where(sample.loss_mask, own, 0.0)
    return replace(sample, advantages=advantages_T.astype(np.float32))


def weigh(
    samples: Sequence[Sample], aggregation: Aggregation, max_response_length: int
) -> list[Sample]:
    """The same samples with `weights` set. Give it all samples of one optimizer step."""
    weights = aggregation(samples, max_response_length)
    return [replace(s, weights=w) for s, w in zip(samples, weights, strict=True)]


def teaches(samples: Sequence[Sample]) -> bool:
    """Whether any trained token has an advantage: without one, nothing is to be learnt."""
    return any(
        s.advantages is not None and bool((np.abs(s.advantages) > NEGLIGIBLE).any())
        for s in samples
    )
