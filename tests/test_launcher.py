"""Which folder a run gets, and which one is gone on in."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from astuner.config.load import load_config
from astuner.launcher import run_folder
from astuner.trainer import Checkpoints, TrainerState
from tests.trainer.toys import ToyPolicy


def folder(runs: Path, *, resume: bool = False, backbone: str = "local") -> Path:
    settings = ["experiment_name=x"]
    loaded = load_config(None, settings, backbone=backbone, experiment_dir=str(runs))
    return run_folder(loaded, resume=resume)


def checkpoint(run: Path) -> None:
    state = TrainerState(1, 0, "")
    asyncio.run(Checkpoints(run / "checkpoints").save(ToyPolicy(), state))


def test_folders_are_numbered_and_debugging_has_its_own(tmp_path: Path) -> None:
    assert folder(tmp_path) == tmp_path / "x"
    (tmp_path / "x").mkdir()
    assert folder(tmp_path) == tmp_path / "x-2"
    assert folder(tmp_path, backbone="debug") == tmp_path / "x-debug"


def test_resume_takes_the_newest_folder_with_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x", "x-2", "x-3"):
        (tmp_path / name).mkdir()
    assert folder(tmp_path, resume=True) == tmp_path / "x-3"
    checkpoint(tmp_path / "x")
    checkpoint(tmp_path / "x-2")
    assert folder(tmp_path, resume=True) == tmp_path / "x-2"
    assert f"{tmp_path / 'x-3'} has no checkpoint" in capsys.readouterr().err
