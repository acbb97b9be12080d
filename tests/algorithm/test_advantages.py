"""Every estimator on numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from astuner.algorithm import ADVANTAGES, resolve
from astuner.algorithm.advantages import (
    dr_grpo,
    grpo,
    reinforce,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo,
)


def outcomes(*rewards: float) -> list[np.ndarray]:
    """A group whose episodes have one reward each."""
    return [np.array([r]) for r in rewards]


def flat(group: list[np.ndarray]) -> list[float]:
    return [float(x) for episode in group for x in episode]


def test_grpo_divides_by_the_sample_deviation() -> None:
    # mean 1/4; deviation sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2
    [advantages] = grpo([outcomes(1, 0, 0, 0)])
    assert flat(advantages) == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)


def test_grpo_keeps_groups_apart() -> None:
    low, high = grpo([outcomes(0, 2), outcomes(100, 102)])
    root = 1 / np.sqrt(2)  # deviation of a pair two apart is sqrt(2)
    assert flat(low) == pytest.approx([-root, root], rel=1e-5)
    assert flat(high) == pytest.approx([-root, root], rel=1e-5)


def test_grpo_with_turn_rewards_sums_the_normalised_rewards_to_come() -> None:
    # DeepSeekMath 4.1.3: rewards 0 1 | 1 | 2 2 2; the mean of all six is 4/3
    group = [np.array([0.0, 1.0]), np.array([1.0]), np.array([2.0, 2.0, 2.0])]
    values = np.array([0, 1, 1, 2, 2, 2.0])
    deviation = np.sqrt(((values - 4 / 3) ** 2).sum() / 5)  # sqrt(10/3 / 5)
    assert deviation == pytest.approx(0.8164966, rel=1e-6)
    [(first, second, third)] = grpo([group])
    assert first == pytest.approx(np.array([-5 / 3, -1 / 3]) / deviation, rel=1e-5)
    assert second == pytest.approx(np.array([-1 / 3]) / deviation, rel=1e-5)
    assert third == pytest.approx(np.array([2.0, 4 / 3, 2 / 3]) / deviation, rel=1e-5)


@pytest.mark.parametrize("reward", [0.0, 0.1, -3.7])
def test_equal_rewards_teach_nothing(reward: float) -> None:
    group = outcomes(*[reward] * 7)
    for estimator in (grpo, dr_grpo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline):
        assert np.abs(flat(estimator([group])[0])).max() < 1e-8


def test_a_group_of_one_teaches_nothing_where_the_group_is_the_baseline() -> None:
    for estimator in (grpo, dr_grpo, rloo):
        assert flat(estimator([outcomes(5.0)])[0]) == [0.0]


@pytest.mark.filterwarnings("error")
def test_empty_groups_stay_empty() -> None:
    for name in ADVANTAGES:
        assert resolve(ADVANTAGES, name)([[], outcomes(1)])[0] == []
        assert resolve(ADVANTAGES, name)([]) == []


def test_dr_grpo_only_centres() -> None:
    [advantages] = dr_grpo([outcomes(1, 0, 0, 0)])
    assert flat(advantages) == [0.75, -0.25, -0.25, -0.25]


def test_dr_grpo_with_turn_rewards() -> None:
    [(first, second)] = dr_grpo([[np.array([1.0, 3.0]), np.array([0.0, 0.0])]])
    assert list(first) == [2.0, 2.0]  # 1-1 + 3-1, then 3-1
    assert list(second) == [-2.0, -1.0]


def test_rloo_compares_with_the_others() -> None:
    [advantages] = rloo([outcomes(1, 0, 0, 0)])
    assert flat(advantages) == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


def test_rloo_leaves_out_whole_episodes_not_turns() -> None:
    [(first, second)] = rloo([[np.array([1.0, 3.0]), np.array([0.0, 1.0, 2.0])]])
    assert list(first) == [2.0, 2.0]  # baseline 3/3: 0 + 2, 2
    assert list(second) == [-3.0, -1.0, 0.0]  # baseline 4/2: -2 -1 + 0


def test_reinforce_is_the_reward_to_go() -> None:
    [(single, turns)] = reinforce([[np.array([2.0]), np.array([1.0, 0.0, 5.0])]])
    assert list(single) == [2.0]
    assert list(turns) == [6.0, 5.0, 5.0]


def test_reinforce_plus_plus_normalises_over_the_batch() -> None:
    # returns 1 1 0 0: mean 1/2, deviation sqrt(4 * 1/4 / 3); equal rewards still teach
    first, second = reinforce_plus_plus([outcomes(1, 1), outcomes(0, 0)])
    expected = 0.5 / np.sqrt(1 / 3)
    assert flat(first) == pytest.approx([expected, expected], rel=1e-5)
    assert flat(second) == pytest.approx([-expected, -expected], rel=1e-5)


def test_reinforce_plus_plus_needs_no_groups() -> None:
    result = reinforce_plus_plus([outcomes(1), outcomes(0)])
    assert [flat(g)[0] for g in result] == pytest.approx([2**-0.5, -(2**-0.5)], rel=1e-5)


def test_reinforce_plus_plus_baseline_centres_by_group_and_scales_by_batch() -> None:
    # centred: 1 -1 | 10 -10 | 0 0; mean 0; deviation sqrt(202 / 5)
    result = reinforce_plus_plus_baseline([outcomes(2, 0), outcomes(30, 10), outcomes(7, 7)])
    deviation = np.sqrt(202 / 5)
    assert flat(result[0]) == pytest.approx([1 / deviation, -1 / deviation], rel=1e-5)
    assert flat(result[1]) == pytest.approx([10 / deviation, -10 / deviation], rel=1e-5)
    assert flat(result[2]) == [0.0, 0.0]
