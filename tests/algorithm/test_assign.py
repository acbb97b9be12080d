"""From groups to per-token advantages and weights."""

from __future__ import annotations

import numpy as np
import pytest

from astuner.algorithm.advantages import dr_grpo, grpo, reinforce, reinforce_plus_plus
from astuner.algorithm.aggregation import token_mean
from astuner.algorithm.assign import credit, teaches, weigh
from astuner.types import Sample

from .small_samples import episode, group, sample, two_targets


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


def advantages_of(samples: list[Sample], tag: str) -> list[list[float]]:
    """Of the trained tokens, sample by sample."""
    return [s.advantages[s.loss_mask].tolist() for s in samples if s.target_tag == tag]


def test_each_target_has_a_baseline_of_its_own() -> None:
    # wolf: 1, 0 -> mean 0.5; villager: 10, 20, 30 -> mean 20, whatever the wolves got
    a = two_targets("a", {"wolf": (1.0,), "villager": (10.0,)}, ["wolf", "villager"])
    b = two_targets("b", {"wolf": (0.0,), "villager": (20.0,)}, ["wolf", "villager"])
    c = two_targets("c", {"villager": (30.0,)}, ["villager"])  # here no wolf spoke
    [samples] = credit([group("g", a, b, c)], dr_grpo)
    assert advantages_of(samples, "wolf") == [[0.5], [-0.5]]
    assert advantages_of(samples, "villager") == [[-10.0], [0.0], [10.0]]
    assert [s.target_tag for s in samples] == ["wolf", "villager"] * 2 + ["villager"]


def test_the_deviation_is_the_targets_own_too() -> None:
    a = two_targets("a", {"wolf": (1.0,), "villager": (100.0,)}, ["wolf", "villager"])
    b = two_targets("b", {"wolf": (0.0,), "villager": (0.0,)}, ["wolf", "villager"])
    [samples] = credit([group("g", a, b)], grpo)
    # +-0.5 / sqrt(0.5) and +-50 / sqrt(5000)
    for tag in ("wolf", "villager"):
        assert np.allclose(advantages_of(samples, tag), [[0.70710], [-0.70710]], atol=1e-5)


def test_a_targets_list_is_over_its_own_calls() -> None:
    order = ["wolf", "villager", "wolf", "villager", "wolf"]
    e = two_targets("a", {"wolf": (1.0, 2.0, 4.0), "villager": (8.0,)}, order)
    [samples] = credit([group("g", e)], reinforce)
    assert advantages_of(samples, "wolf") == [[7.0], [6.0], [4.0]]  # this and later ones
    assert advantages_of(samples, "villager") == [[8.0], [8.0]]


def test_a_batch_is_normalised_for_each_target_apart() -> None:
    a = two_targets("a", {"wolf": (1.0,), "villager": (5.0,)}, ["wolf", "villager"], group="g")
    b = two_targets("b", {"wolf": (3.0,), "villager": (5.0,)}, ["wolf", "villager"], group="h")
    g, h = credit([group("g", a), group("h", b)], reinforce_plus_plus)
    # wolf: mean 2, std sqrt(2); villager: all the same
    assert np.allclose(advantages_of(g, "wolf") + advantages_of(h, "wolf"), [[-0.7071], [0.7071]])
    assert advantages_of(g, "villager") + advantages_of(h, "villager") == [[0.0], [0.0]]


def test_an_episode_with_one_number_counts_for_every_target_of_it() -> None:
    a = two_targets("a", {"wolf": (1.0,), "villager": (0.0,)}, ["wolf", "villager"])
    b = two_targets("b", None, ["wolf", "villager"], reward=3.0)
    [samples] = credit([group("g", a, b)], dr_grpo)
    assert advantages_of(samples, "wolf") == [[-1.0], [1.0]]
    assert advantages_of(samples, "villager") == [[-1.5], [1.5]]


def test_a_group_has_the_same_baseline_beside_one_that_rewards_its_targets() -> None:
    # The villager spoke in the first episode only; both count for a reward of the whole episode.
    a = two_targets("a", None, ["wolf", "villager"], reward=1.0)
    b = two_targets("b", None, ["wolf"], reward=0.0)
    by_target = two_targets("c", {"wolf": (1.0,)}, ["wolf"], group="h")
    [alone] = credit([group("g", a, b)], dr_grpo)
    _, beside = credit([group("h", by_target), group("g", a, b)], dr_grpo)
    for samples in (alone, beside):
        assert advantages_of(samples, "wolf") == [[0.5], [-0.5]]
        assert advantages_of(samples, "villager") == [[0.5]]


def test_a_target_without_a_reward_gets_nothing() -> None:
    e = two_targets("a", {"wolf": (1.0,)}, ["wolf", "user"])
    [samples] = credit([group("g", e)], reinforce)
    assert advantages_of(samples, "user") == [[0.0]]
