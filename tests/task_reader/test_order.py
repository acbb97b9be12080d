"""The order is full batches, fair, seeded, and needs nothing but the step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astuner.errors import DataError
from astuner.task_reader import TaskOrder


def test_without_shuffling_epochs_run_into_each_other() -> None:
    order = TaskOrder(num_tasks=5, batch_size=3, seed=0, shuffle=False)
    assert [order.indices(step) for step in range(4)] == [
        [0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1],
    ]  # fmt: skip
    assert order.steps_per_epoch == 2


def test_the_shuffle_is_fixed_for_ever() -> None:
    """A checkpoint of today must resume with the same tasks tomorrow."""
    order = TaskOrder(num_tasks=6, batch_size=3, seed=1)
    assert [order.indices(step) for step in range(4)] == [
        [5, 0, 4], [2, 3, 1], [4, 5, 2], [0, 1, 3],
    ]  # fmt: skip


@given(
    st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**31), st.integers(1, 4), st.booleans()
)
def test_every_task_comes_equally_often(tasks, batch, seed, epochs, shuffle) -> None:
    order = TaskOrder(tasks, batch, seed, shuffle)
    steps = -(-tasks * epochs // batch)
    drawn = [i for step in range(steps) for i in order.indices(step)]
    assert len(drawn) == steps * batch
    assert Counter(drawn[: tasks * epochs]) == dict.fromkeys(range(tasks), epochs)
    again = TaskOrder(tasks, batch, seed, shuffle)
    assert again.indices(steps - 1) == drawn[-batch:]


def test_seeds_and_epochs_differ() -> None:
    def epoch(seed: int, step: int) -> list[int]:
        return TaskOrder(50, 50, seed).indices(step)

    assert epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != sorted(epoch(0, 0))


@pytest.mark.parametrize(("tasks", "batch"), [(0, 2), (2, 0)])
def test_nothing_to_order(tasks: int, batch: int) -> None:
    with pytest.raises(DataError, match=f"batches of {batch} from {tasks} training tasks"):
        TaskOrder(tasks, batch, 0)
