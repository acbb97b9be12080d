"""Which step a group is credited to, and how long its file stays for a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from astuner.backbone.spawned.batches import BatchRecord, forget_batches, note_batch
from astuner.backbone.spawned.files import SPOOL, GroupRecord, spool_group
from astuner.backbone.verl.waiting import Taken, Waiting
from tests.tracking.records import episode

pytest.importorskip("cloudpickle", reason="cloudpickle comes with astuner[verl]")


def spool(folder: Path, group: str, name: str = "", step: int = 1, kept: bool = True) -> None:
    one = episode(group_id=group)
    spool_group(folder, GroupRecord(step, "train", group, (one,), kept, {}, name or f"uid-{group}"))


def note(folder: Path, step: int, *groups: str, left_out: tuple[str, ...] = ()) -> None:
    uids = [tuple(f"uid-{name}" for name in names) for names in (groups, left_out)]
    note_batch(folder, BatchRecord(step, *uids))


def names(taken: Taken) -> tuple[list[str], list[str]]:
    return [r.group_id for r in taken.records], [r.group_id for r in taken.stale]


def files(folder: Path) -> int:
    return len(list((folder / SPOOL).glob("*.group")))


def test_groups_belong_to_the_step_that_the_sampler_took_them_for(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path)
    for group in "abcd":
        spool(tmp_path, group)
    spool(tmp_path, "failed", kept=False)
    note(tmp_path, 1, "d", "b", left_out=("failed",))
    note(tmp_path, 2, "c", left_out=("a",))
    assert [r.group_id for r in waiting.new(None)] == [*"abcd", "failed"]
    assert waiting.knows(1) and waiting.knows(2) and not waiting.knows(3)
    assert names(waiting.take(1)) == (["b", "d", "failed"], [])
    assert names(waiting.take(2)) == (["c"], ["a"])
    assert files(tmp_path) == 0


def test_several_mini_batches_and_a_group_that_is_seen_late(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path)
    spool(tmp_path, "a")
    note(tmp_path, 1, "a")
    note(tmp_path, 1, "b")
    waiting.new(None)
    assert names(waiting.take(1)) == (["a"], [])
    spool(tmp_path, "b")  # another machine's file takes its time
    waiting.new(None)
    assert names(waiting.take(2)) == (["b"], [])


def test_what_a_checkpoint_may_hand_back_stays(tmp_path: Path) -> None:
    """Step 1 is saved while "c" waits and "d" is still played; step 2 trains both, then a kill."""
    waiting = Waiting(tmp_path)
    for group in "abc":
        spool(tmp_path, group)
    note(tmp_path, 1, "a", "b")
    waiting.new(None)
    waiting.take(1)
    assert files(tmp_path) == 1
    waiting.new(1)
    spool(tmp_path, "d")
    note(tmp_path, 2, "c", "d")
    waiting.new(1)
    assert names(waiting.take(2)) == (["c", "d"], [])
    assert files(tmp_path) == 1, "c: a resume from step 1 gets its rows back"

    resumed = Waiting(tmp_path)
    forget_batches(tmp_path, after=1)
    assert [r.group_id for r in resumed.new(1)] == ["c"]
    assert names(resumed.take(1)) == ([], [])
    spool(tmp_path, "d", "uid-again", step=2)
    note_batch(tmp_path, BatchRecord(2, ("uid-again",)))
    note(tmp_path, 3, "c")
    resumed.new(1)
    assert names(resumed.take(2)) == (["d"], [])
    assert names(resumed.take(3)) == (["c"], [])
    assert files(tmp_path) == 1
    resumed.new(3)
    assert files(tmp_path) == 0


def test_what_is_in_a_checkpoints_weights_does_not_stay(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path)
    spool(tmp_path, "a")
    note(tmp_path, 1, "a")
    waiting.new(1)  # step 1 is saved before it is reported
    assert names(waiting.take(1)) == (["a"], [])
    assert files(tmp_path) == 0


def test_a_group_that_is_rolled_out_again_takes_the_place_of_the_earlier_one(
    tmp_path: Path,
) -> None:
    spool(tmp_path, "a", step=2)
    waiting = Waiting(tmp_path)
    waiting.new(None)
    spool(tmp_path, "a", "uid-again", step=3)
    note_batch(tmp_path, BatchRecord(3, ("uid-again",)))
    waiting.new(None)
    assert [r.step for r in waiting.take(3).records] == [3]
    assert files(tmp_path) == 0


def test_forgotten_are_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    forget_batches(tmp_path, after=1)
    for step in (1, 2, 3):
        note(tmp_path, step, "a")
    path = tmp_path / "batches.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 1, "gro')
    forget_batches(tmp_path, after=2)
    assert path.read_text() == "".join(whole.splitlines(keepends=True)[:2])
