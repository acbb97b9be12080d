"""How much each trained token counts in the loss of one optimizer step.

The loss is `sum over tokens of weight * token loss`, so the weights hold every
division there is: they are made once, over all samples of an optimizer step, and
splitting these into micro-batches afterwards changes nothing. Every function here
takes those samples and returns one array [T] for each, 0 where the loss mask is
false. A sample without trained tokens weighs nothing and counts for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from astuner.types import Sample

Weights = NDArray[np.float32]
Aggregation = Callable[[Sequence[Sample], int], list[Weights]]
"""`(samples, max_response_length) -> weights`, one [T] for each sample."""


def episode_mean(samples: Sequence[Sample], max_response_length: int = 0) -> list[Weights]:
    """1 / (E n_i): each of the E episodes counts as one, whatever its length.

    GRPO (DeepSeekMath, Shao et al. 2024, equation 3): 1/G sum_i 1/|o_i| sum_t. Here |o_i|
    is n_i, all trained tokens of the episode, over all timelines it fell into. All
    weights sum to 1.
    """
    tokens = _tokens_per_episode(samples)
    episodes = len(tokens)
    return [_spread(s, 1.0 / (episodes * tokens[_episode(s)] or 1)) for s in samples]


def token_mean(samples: Sequence[Sample], max_response_length: int = 0) -> list[Weights]:
    """1 / N: every one of the N trained tokens counts the same.

    DAPO (Yu et al. 2025, arXiv 2503.14476), equation 12. All weights sum to 1.
    """
    total = sum(s.num_trained for s in samples)
    return [_spread(s, 1.0 / (total or 1)) for s in samples]


def constant(samples: Sequence[Sample], max_response_length: int) -> list[Weights]:
    """1 / (E L), L = max_response_length: tokens count the same in every batch.

    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), section 3.2. The weights
    sum to the mean fraction of L that the E episodes used.
    """
    episodes = len(_tokens_per_episode(samples))
    return [_spread(s, 1.0 / (episodes * max_response_length or 1)) for s in samples]


def _episode(sample: Sample) -> tuple[str, str]:
    return sample.group_id, sample.episode_id


def _tokens_per_episode(samples: Sequence[Sample]) -> Counter[tuple[str, str]]:
    """Trained tokens of each episode that has any."""
    tokens: Counter[tuple[str, str]] = Counter()
    for sample in samples:
        if sample.num_trained:
            tokens[_episode(sample)] += sample.num_trained
    return tokens


def _spread(sample: Sample, weight: float) -> Weights:
    return np.where(sample.loss_mask, np.float32(weight), np.float32(0.0))
