"""Whole or not there: what is on disk after saves, crashes and full disks."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from astuner.errors import CheckpointError
from astuner.trainer import Checkpoints, EvalResult, Totals, TrainerState

from .toys import ToyPolicy


def state(step: int) -> TrainerState:
    return TrainerState(step, seed=7, config_hash="abc")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


async def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    full = TrainerState(
        step=10,
        seed=7,
        config_hash="abc",
        totals=Totals(100, 60, {"context": 40}, 8, 1, 2, 12.5),
        evals={0: EvalResult(0.1, 64), 10: EvalResult(0.5, 64, {"length": 3.0})},
        source={"cursor": [3, 1]},
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    path = await checkpoints.save(ToyPolicy(logits=np.arange(5.0)), full)
    assert path.name == "checkpoint-000010"
    assert names(path) == ["logits.npy", "momentum.npy", "trainer_state.json"]
    newest = checkpoints.latest()
    assert newest is not None
    assert newest.path == path
    assert newest.state == full


async def test_older_ones_go_only_when_the_new_one_is_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30):
        await checkpoints.save(ToyPolicy(), state(step))
    assert names(tmp_path) == ["checkpoint-000020", "checkpoint-000030"]


async def test_a_rolling_one_gives_way_to_the_next_of_either_kind(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    await checkpoints.save(ToyPolicy(), state(1), rolling=True)
    await checkpoints.save(ToyPolicy(), state(2), rolling=False)
    assert names(tmp_path) == ["checkpoint-000002"]
    await checkpoints.save(ToyPolicy(), state(3), rolling=True)
    await checkpoints.save(ToyPolicy(), state(4), rolling=True)
    assert names(tmp_path) == ["checkpoint-000002", "rolling-000004"]
    newest = checkpoints.latest()
    assert newest is not None and newest.state.step == 4


async def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    await checkpoints.save(ToyPolicy(), state(1))
    path = await checkpoints.save(ToyPolicy(logits=np.ones(5)), state(1))
    assert names(tmp_path) == ["checkpoint-000001"]
    assert np.load(path / "logits.npy").tolist() == [1.0] * 5


async def test_checkpoints_of_later_steps_are_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 9, 2):
        await checkpoints.save(ToyPolicy(), state(step))
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000009"]


async def test_what_a_killed_process_left_is_ignored_then_cleared(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    await checkpoints.save(ToyPolicy(), state(1))
    (tmp_path / ".unfinished-checkpoint-000002").mkdir()
    (tmp_path / ".unfinished-checkpoint-000002" / "logits.npy").write_bytes(b"half")
    (tmp_path / "checkpoint-000003").mkdir()  # no trainer state: copied by hand, perhaps
    newest = checkpoints.latest()
    assert newest is not None and newest.state.step == 1
    await checkpoints.save(ToyPolicy(), state(4))
    assert not list(tmp_path.glob(".unfinished*"))


async def test_a_damaged_state_is_passed_over_and_named_when_asked_for(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    await checkpoints.save(ToyPolicy(), state(1))
    damaged = await checkpoints.save(ToyPolicy(), state(2))
    whole = (damaged / "trainer_state.json").read_text()
    for text in (whole[:40], "[]", json.dumps(json.loads(whole) | {"format": 99})):
        (damaged / "trainer_state.json").write_text(text)
        newest = checkpoints.latest()
        assert newest is not None and newest.state.step == 1
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoints.read(damaged)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        checkpoints.read(tmp_path / "nowhere")


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none").latest() is None


async def test_a_full_disk_loses_nothing_and_says_what_is_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    await checkpoints.save(ToyPolicy(), state(1))

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError) as error:
        await checkpoints.save(ToyPolicy(before_save=full), state(2))
    assert "checkpoint of step 2" in str(error.value)
    assert "No space left on device" in str(error.value)
    assert "still there: checkpoint-000001" in str(error.value)
    assert names(tmp_path) == ["checkpoint-000001"]


async def test_any_other_error_leaves_no_half_folder_either(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        await Checkpoints(tmp_path).save(ToyPolicy(before_save=broken), state(2))
    assert names(tmp_path) == []
