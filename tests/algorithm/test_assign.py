"""From groups to per-token advantages and weights."""

from __future__ import annotations

import numpy as np
import pytest

from astuner.algorithm.advantages import dr_grpo, reinforce
from astuner.algorithm.aggregation import token_mean
from astuner.algorithm.assign import credit, teaches, weigh

from .small_samples import episode, group, sample


def test_one_reward_goes_to_every_trained_token_of_every_timeline() -> None:
    a = episode("a", 1.0, [sample("a", [0, 1, 0, 1]), sample("a", [0, 1])])
    b = episode("b", 0.0, [sample("b", [0, 1, 1])])
    [samples] = credit([group("g", a, b)], dr_grpo)
    assert [list(s.advantages) for s in samples] == [[0, 0.5, 0, 0.5], [0, 0.5], [0, -0.5, -0.5]]
    assert all(s.advantages.dtype == np.float32 for s in samples)


def test_the_baseline_is_over_episodes_not_samples() -> None:
    five = episode("a", 1.0, [sample("a", [0, 1]) for _ in range(5)])
    one = episode("b", 0.0, [sample("b", [0, 1])])
    [samples] = credit([group("g", five, one)], dr_grpo)
    assert [float(s.advantages[1]) for s in samples] == [0.5] * 5 + [-0.5]


def test_turn_rewards_reach_the_tokens_of_their_turn() -> None:
    # two timelines: turns 0 and 2 in the first, turn 1 in the second
    first = sample("a", [0, 1, 0, 1], turns=[-1, 0, -1, 2])
    second = sample("a", [0, 1], turns=[-1, 1])
    e = episode("a", 3.0, [first, second], turn_rewards=(1.0, 2.0, 4.0))
    [[s, t]] = credit([group("g", e)], reinforce)
    assert list(s.advantages) == [0, 7, 0, 4]
    assert list(t.advantages) == [0, 6]


def test_a_group_teaches_when_any_advantage_is_not_zero() -> None:
    same = group("g", episode("a", 0.1, [sample("a", [0, 1])]), episode("b", 0.1, []))
    other = group("h", episode("a", 0.1, [sample("a", [0, 1])]), episode("b", 0.2, []))
    equal, different = credit([same, other], dr_grpo)
    assert not teaches(equal)
    assert teaches(different)


def test_weigh_sets_weights_and_keeps_the_rest() -> None:
    [samples] = credit([group("g", episode("a", 1.0, [sample("a", [0, 1, 1])]))], reinforce)
    [weighed] = weigh(samples, token_mean, 10)
    assert list(weighed.weights) == [0, 0.5, 0.5]
    assert list(weighed.advantages) == [0, 1, 1]
    assert weighed.weights.sum() == pytest.approx(1.0)
