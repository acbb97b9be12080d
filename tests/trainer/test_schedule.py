"""Learning rates by hand."""

from __future__ import annotations

import pytest

from astuner.errors import ConfigError
from astuner.trainer.schedule import check_schedule, learning_rate


def rates(schedule: str, warmup: int, total: int) -> list[float]:
    return [
        learning_rate(s, lr=1.0, schedule=schedule, warmup_steps=warmup, total_steps=total)
        for s in range(1, total + 1)
    ]


def test_constant_after_warm_up() -> None:
    assert rates("constant", 2, 4) == [0.5, 1.0, 1.0, 1.0]


def test_linear_ends_above_zero() -> None:
    assert rates("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25]
    assert rates("linear", 2, 4) == [0.5, 1.0, 1.0, 0.5]


def test_cosine() -> None:
    assert rates("cosine", 1, 5) == pytest.approx([1.0, 1.0, 0.8535534, 0.5, 0.1464466])


def test_warm_up_longer_than_the_run() -> None:
    assert rates("linear", 10, 3) == pytest.approx([0.1, 0.2, 0.3])


def test_an_unknown_schedule_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match="lr_schedule is 'cosin'; choose one of: constant"):
        check_schedule("cosin")
