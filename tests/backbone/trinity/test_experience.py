"""Samples as rows of Trinity's buffer, and their advantages; by hand."""

from __future__ import annotations

import pytest

from astuner.algorithm.advantages import dr_grpo, grpo
from astuner.backbone.trinity.experience import group_rows, validation_rows
from tests.backbone.trinity.made_up import all_failed, group


def test_a_row_is_cut_where_training_begins_and_ends() -> None:
    row = group_rows(group(), dr_grpo, kept=True)[0]
    assert row.tokens == [100, 101, 102, 103, 104]  # the last token is after the last trained one
    assert row.prompt_length == 2
    assert row.action_mask == [True, False, True]
    assert row.logprobs == [-0.5, 0.0, -0.5]
    assert row.advantages == pytest.approx([0.5, 0.0, 0.5])
    assert (row.reward, row.run, row.step) == (1.0, 0, 0)
    assert row.told == {"episode": "e0", "oldest": 2, "newest": 2, "group": "g0", "rows": 4}


def test_the_group_is_episodes_however_many_timelines_they_fell_into() -> None:
    rows = group_rows(group(), dr_grpo, kept=True)
    # the mean of 1, 0 and 0.5 is 0.5; over timelines it would be 0.625
    assert [(r.run, r.step) for r in rows] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert [r.advantages[0] for r in rows] == pytest.approx([0.5, 0.5, -0.5, 0.0])
    assert {r.told["rows"] for r in rows} == {4}
    assert rows[1].told["oldest"] == 3


def test_grpo_divides_by_the_deviation_of_the_episodes() -> None:
    rows = group_rows(group(), grpo, kept=True)
    # rewards 1, 0, 0.5: deviations 0.5, -0.5, 0; standard deviation 0.5 (n - 1)
    assert [r.advantages[0] for r in rows] == pytest.approx([1.0, 1.0, -1.0, 0.0], abs=1e-4)


@pytest.mark.parametrize(("made", "kept"), [(group(), False), (all_failed(), True)])
def test_a_group_that_teaches_nothing_leaves_one_masked_row(made: object, kept: bool) -> None:
    [row] = group_rows(made, dr_grpo, kept=kept)  # type: ignore[arg-type]
    assert (row.num_trained, row.advantages, row.told["rows"]) == (0, [0.0], 1)
    assert (row.told["group"], row.told["oldest"]) == ("g0", 2)
    assert len(row.tokens) == row.prompt_length + len(row.action_mask)


def test_a_failed_episode_of_a_validation_is_worth_nothing() -> None:
    rows = validation_rows(group().episodes)
    assert [(r.run, r.reward, r.num_trained) for r in rows] == [
        (0, 1.0, 0),
        (1, 0.0, 0),
        (2, 0.5, 0),
        (3, 0.0, 0),
    ]
