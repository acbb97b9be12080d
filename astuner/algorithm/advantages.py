"""Advantage estimators: from the rewards of a batch of groups to advantages.

Every estimator maps groups of episodes to advantages of the same shape. An episode
is the array [S] of its rewards turn by turn, or [1] when it has one reward for
everything; entry s of the result is the advantage of turn s (of all turns when S is
1). Groups are over episodes, never over samples. With turn rewards a turn is
credited with this and all later rewards, each after the estimator's own baseline
(process supervision). Nothing here knows tokens; `assign` puts the numbers on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Rewards = NDArray[np.float64]
"""One episode: its rewards turn by turn [S], or [1]."""
GroupRewards = Sequence[Rewards]
Estimator = Callable[[Sequence[GroupRewards]], list[list[Rewards]]]

EPSILON = 1e-6
"""Added to a standard deviation before dividing by it."""


def grpo(groups: Sequence[GroupRewards]) -> list[list[Rewards]]:
    """Group-normalised rewards: A_i = (r_i - mean(r)) / std(r).

    DeepSeekMath (Shao et al. 2024, arXiv 2402.03300), section 4.1.2; with turn rewards
    section 4.1.3: mean and std over all rewards of all turns of the group, and
    A_{i,t} = sum of the normalised rewards of turn t and later. The standard deviation
    is the sample one (divided by G - 1), as in TRL and verl.
    """
    return [_to_go(_scaled(_centred(group), _std(_flat([group])))) for group in groups]


def dr_grpo(groups: Sequence[GroupRewards]) -> list[list[Rewards]]:
    """A_i = r_i - mean(r): without GRPO's division, which favours too easy and too hard tasks.

    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), section 3.2. Its other half, the
    constant length normaliser, is `aggregation.constant`.
    """
    return [_to_go(_centred(group)) for group in groups]


def rloo(groups: Sequence[GroupRewards]) -> list[list[Rewards]]:
    """A_i = r_i - mean of the other episodes' rewards, so the baseline is unbiased.

    RLOO (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740). With
    turn rewards the baseline is the mean over all turns of the other episodes. A group
    of one has no others, and gets 0.
    """
    return [_to_go(_leave_one_out(group)) for group in groups]


def reinforce(groups: Sequence[GroupRewards]) -> list[list[Rewards]]:
    """A_i = r_i, no baseline; with turn rewards the sum of this and later ones.

    REINFORCE (Williams 1992), with reward to go.
    """
    return [_to_go(group) for group in groups]


def reinforce_plus_plus(groups: Sequence[GroupRewards]) -> list[list[Rewards]]:
    """Returns normalised over the whole batch: (R - mean_batch(R)) / std_batch(R).

    REINFORCE++ (Hu et al. 2025, arXiv 2501.03262), its global advantage normalisation.
    Needs no groups: `num_repeat` may be 1. With turn rewards R is the sum of this and
    later ones, and the batch is of turns.
    """
    return _normalised_over_batch([_to_go(group) for group in groups])


def reinforce_plus_plus_baseline(groups: Sequence[GroupRewards]) -> list[list[Rewards]]:
    """Rewards minus their group's mean, then normalised over the whole batch.

    REINFORCE++-Baseline (Hu et al. 2025, arXiv 2501.03262).
    """
    return _normalised_over_batch([_to_go(_centred(group)) for group in groups])


# ---------------------------------------------------------------- the arithmetic


def _flat(groups: Sequence[GroupRewards]) -> Rewards:
    episodes = [episode for group in groups for episode in group]
    return np.concatenate(episodes) if episodes else np.zeros(0)


def _std(rewards_N: Rewards) -> float:
    return float(rewards_N.std(ddof=1)) if len(rewards_N) > 1 else 0.0


def _centred(group: GroupRewards) -> list[Rewards]:
    rewards = _flat([group])
    mean = rewards.mean() if len(rewards) else 0.0
    return [episode - mean for episode in group]


def _scaled(group: GroupRewards, std: float) -> list[Rewards]:
    return [episode / (std + EPSILON) for episode in group]


def _leave_one_out(group: GroupRewards) -> list[Rewards]:
    if len(group) < 2:
        return [np.zeros_like(episode) for episode in group]
    total = sum(float(episode.sum()) for episode in group)
    count = sum(len(episode) for episode in group)
    return [episode - (total - episode.sum()) / (count - len(episode)) for episode in group]


def _to_go(group: GroupRewards) -> list[Rewards]:
    """For each turn, the sum of its own and all later rewards."""
    return [episode[::-1].cumsum()[::-1] for episode in group]


def _normalised_over_batch(groups: Sequence[GroupRewards]) -> list[list[Rewards]]:
    returns = _flat(groups)
    mean = returns.mean() if len(returns) else 0.0
    return [_scaled([episode - mean for episode in group], _std(returns)) for group in groups]
