"""Puts advantages and weights on samples: from Groups to what `Policy` trains on.

`credit` turns the rewards of whole groups into per-token advantages, `weigh` turns
an aggregation into per-token weights; both return new samples. Which groups are
worth training on is the trainer's decision, not made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

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
    """The samples of each group's usable episodes, with `advantages` set.

    An episode whose turn rewards do not have one entry per call must not get here.
    """
    advantages = estimator([[episode_rewards(e) for e in g.usable] for g in groups])
    return [
        [
            with_advantages(sample, of_episode)
            for episode, of_episode in zip(group.usable, of_group, strict=True)
            for sample in episode.samples
        ]
        for group, of_group in zip(groups, advantages, strict=True)
    ]


def with_advantages(sample: Sample, advantages_S: Rewards) -> Sample:
    """Each trained token gets its turn's advantage, or the only one there is; others 0."""
    turns_T = np.zeros_like(sample.turns) if len(advantages_S) == 1 else sample.turns
    advantages_T = np.where(sample.loss_mask, advantages_S[turns_T], 0.0)
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
