"""Token weights by hand: what an episode, a timeline and a token count for."""

from __future__ import annotations

import numpy as np
import pytest

from astuner.algorithm.aggregation import constant, episode_mean, token_mean

from .small_samples import sample

SAMPLES = [
    sample("a", [0, 1, 1]),  # episode a: 2 + 2 trained tokens in two timelines
    sample("a", [0, 0, 1, 1]),
    sample("b", [0, 1]),
    sample("c", [0, 0]),  # nothing trained: counts for nothing
]


def test_episode_mean() -> None:
    weights = episode_mean(SAMPLES, 100)
    assert [list(w) for w in weights] == [
        [0, 0.125, 0.125],
        [0, 0, 0.125, 0.125],
        [0, 0.5],
        [0, 0],
    ]


def test_an_episode_in_five_timelines_weighs_as_one() -> None:
    five = [sample("a", [0, 1]) for _ in range(5)]
    weights = episode_mean([*five, sample("b", [0, 1, 1])], 100)
    assert sum(w.sum() for w in weights[:5]) == pytest.approx(0.5)
    assert weights[5].sum() == pytest.approx(0.5)


def test_episodes_of_different_groups_may_share_a_name() -> None:
    weights = episode_mean([sample("0", [0, 1], group="g"), sample("0", [0, 1], group="h")], 1)
    assert [list(w) for w in weights] == [[0, 0.5], [0, 0.5]]


def test_token_mean() -> None:
    weights = token_mean(SAMPLES, 100)
    assert np.concatenate(weights).sum() == pytest.approx(1.0)
    assert weights[0][1] == weights[2][1] == pytest.approx(0.2)


def test_constant_divides_by_the_longest_response() -> None:
    weights = constant(SAMPLES, 10)
    assert weights[0][1] == weights[2][1] == pytest.approx(1 / 20)
    assert sum(w.sum() for w in weights) == pytest.approx(5 / 20)


@pytest.mark.parametrize("aggregation", [episode_mean, token_mean, constant])
def test_nothing_trained_is_no_division_by_zero(aggregation) -> None:
    assert [list(w) for w in aggregation([sample("a", [0, 0])], 10)] == [[0, 0]]
    assert aggregation([], 10) == []
