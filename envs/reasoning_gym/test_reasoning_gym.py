"""One question, one answer, the generator's own score."""

from __future__ import annotations

from typing import Any

import pytest

from astuner.env.registry import find_environment
from astuner.errors import EnvError

pytest.importorskip("reasoning_gym", reason="the environment's own requirements.txt")
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def puzzle(**params: Any) -> Any:
    return find_environment("reasoning_gym")("t", params)


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("-4", 1.0),
        ("5 minus 9 makes <answer>-4</answer>", 1.0),
        ("so \\boxed{-4}", 1.0),
        ("4", 0.0),
    ],
)
def test_an_answer_ends_it(reply: str, reward: float) -> None:
    env = puzzle(dataset="chain_sum", **SUMS)
    asked, info = env.reset(seed=3)
    assert asked == "State the final answer to the following arithmetic problem: 5 - 9 ="
    assert info == {"dataset": "chain_sum"}
    assert env.step(reply)[1:4] == (reward, True, False)


def test_the_seed_makes_the_question() -> None:
    env = puzzle(dataset="chain_sum", **SUMS)
    questions = [env.reset(seed=seed)[0] for seed in (3, 3, 4)]
    assert questions[0] == questions[1] != questions[2]


def test_a_reset_without_a_seed_asks_the_same_again() -> None:
    env = puzzle(dataset="chain_sum", **SUMS)
    unseeded, asked = env.reset()[0], env.reset(seed=3)[0]
    assert env.reset()[0] == asked != unseeded


@pytest.mark.parametrize(
    ("params", "told"), [({"dataset": "nope"}, "'nope'"), ({"moons": 1}, "moons")]
)
def test_what_the_package_does_not_know_is_refused(params: dict[str, Any], told: str) -> None:
    with pytest.raises(EnvError, match=told) as caught:
        puzzle(**params)
    assert caught.value.cause == "refused"
