"""Ids and seeds depend on the place in the run and on nothing else."""

from __future__ import annotations

from astuner.task_rollout.naming import Place, derive_seed, episode_id, validation_group_id


def test_ids_are_literal() -> None:
    assert Place(12, 3).group_id == "s00012-t003"
    assert Place(12, 3, 2).group_id == "s00012-t003-again2"
    assert validation_group_id(20, 7) == "v00020-t007"
    assert episode_id("s00012-t003", 5) == "s00012-t003-e05"


def test_seeds_are_stable_across_processes() -> None:
    # literal, so that a change of the formula (which would break resuming) is seen
    assert derive_seed(0, 1, 2, 3) == 1993999705115871
    assert derive_seed(0, 12, 3) != derive_seed(0, 1, 23)
    assert all(0 <= derive_seed(n) < 2**53 for n in range(200))
    assert len({derive_seed(0, step, index) for step in range(30) for index in range(30)}) == 900
