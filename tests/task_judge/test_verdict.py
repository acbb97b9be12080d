"""What counts as a reward, and what is said of everything else."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astuner.errors import RewardError, UserCodeError
from astuner.task_judge import Verdict, to_verdict


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (0.5, Verdict(0.5, None, None)),
        (-2, Verdict(-2.0, None, None)),
        (True, Verdict(1.0, None, True)),
        (False, Verdict(0.0, None, False)),
        (Fraction(1, 4), Verdict(0.25, None, None)),
        (np.float32(0.5), Verdict(0.5, None, None)),
        (np.int64(3), Verdict(3.0, None, None)),
        (np.bool_(True), Verdict(1.0, None, True)),
        (np.array(0.5), Verdict(0.5, None, None)),
        ((0.5, True), Verdict(0.5, None, True)),
        ((0.5, np.bool_(False)), Verdict(0.5, None, False)),
        ((0.5, None), Verdict(0.5, None, None)),
        ((True, False), Verdict(1.0, None, False)),
        ([0.5], Verdict(0.5, (0.5,), None)),
        ([1, 0.25, np.float64(0.25)], Verdict(1.5, (1.0, 0.25, 0.25), None)),
        (np.array([0.5, 1.0]), Verdict(1.5, (0.5, 1.0), None)),
        (([0.5, 0.5], True), Verdict(1.0, (0.5, 0.5), True)),
    ],
)
def test_good_outcomes(outcome: object, verdict: Verdict) -> None:
    found = to_verdict(outcome)
    assert found == verdict
    assert type(found.reward) is float


def test_a_success_known_beforehand() -> None:
    assert to_verdict(0.5, True) == Verdict(0.5, None, True)
    assert to_verdict((0.5, False), True) == Verdict(0.5, None, False)


def test_a_tensor() -> None:
    torch = pytest.importorskip("torch")
    assert to_verdict(torch.tensor(0.5)) == Verdict(0.5, None, None)
    assert to_verdict(torch.tensor([0.5, 0.25])) == Verdict(0.75, (0.5, 0.25), None)


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (None, "The reward is None. Is a `return` missing? Return a number, (number, is_success)"),
        (math.nan, "The reward is nan, which cannot be trained on. Guard divisions"),
        (-math.inf, "The reward is -inf, which cannot be trained on."),
        (np.float32("nan"), "The reward is nan"),
        (10**400, "The reward is inf"),
        ("0.5", "The reward is '0.5' (str), not a number."),
        ({1: 1.0}, "The reward names the target 1, not a text."),
        ({}, "The reward is an empty dict."),
        ({"a": []}, "The reward of target 'a' is an empty list."),
        ({"a": float("nan")}, "The reward of target 'a' is nan, which cannot be trained on."),
        ({"a": [1.0, "x"]}, "The reward of target 'a' is 'x' (str), not a number."),
        (1j, "The reward is 1j (complex), not a number."),
        (Decimal("0.5"), "The reward is Decimal('0.5') (Decimal), not a number."),
        ([], "The reward is an empty list."),
        ([0.5, math.nan], "The reward at turn 1 is nan"),
        ([0.5, None], "The reward at turn 1 is None."),
        ([[0.5]], "The reward at turn 0 is [0.5] (list), not a number."),
        ([1e308, 1e308], "The reward (the sum of the list) is inf"),
        ((math.nan, True), "The reward is nan"),
        ((0.5, 1.0), "The reward is the tuple (0.5, 1.0), but a tuple means (reward, is_success)"),
        ((0.5,), "The reward is the tuple (0.5,), but a tuple means"),
        (
            (0.5, True, 1),
            "but a tuple means (reward, is_success) with is_success True, False or No",
        ),
        ((), "The reward is the tuple ()"),
    ],
)
def test_bad_outcomes(outcome: object, message: str) -> None:
    with pytest.raises(RewardError) as caught:
        to_verdict(outcome)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, UserCodeError)


NUMBERS = st.floats(allow_nan=True) | st.integers() | st.booleans()
ANYTHING = st.recursive(
    NUMBERS | st.none() | st.text(max_size=3) | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=5,
)


@given(ANYTHING)
def test_every_outcome_is_finite_or_a_typed_error(outcome: object) -> None:
    try:
        verdict = to_verdict(outcome)
    except RewardError:
        return
    assert math.isfinite(verdict.reward)
    if verdict.turn_rewards is not None:
        assert all(map(math.isfinite, verdict.turn_rewards))
        assert verdict.reward == sum(verdict.turn_rewards)


def test_a_dict_is_by_target() -> None:
    verdict = to_verdict(({"wolf": 1, "villager": np.array([0.5, -1.0])}, True))
    assert verdict.target_rewards == {"wolf": (1.0,), "villager": (0.5, -1.0)}
    assert (verdict.reward, verdict.turn_rewards, verdict.is_success) == (0.25, None, True)
