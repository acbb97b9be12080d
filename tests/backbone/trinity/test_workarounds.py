"""What is worked around in Trinity: each test fails once that is no longer needed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from astuner.backbone.trinity import workarounds
from astuner.backbone.trinity.workarounds import BREAKS, IN_MEMORY, Breaks

trinity = pytest.mark.trinity


def source(module: str, name: str) -> str:
    """Of a class or function of Trinity's."""
    from importlib import import_module

    return inspect.getsource(getattr(import_module(module), name))


@trinity
def test_a_step_that_is_saved_and_synced_leaves_no_sampler_with_checkpoint_sync() -> None:
    train = source("trinity.trainer.trainer", "Trainer")
    assert "need_sync and not (need_save and self.sync_method == SyncMethod.CHECKPOINT)" in train
    wrapper: Any = __import__(
        "trinity.trainer.tinker.tinker_trainer", fromlist=["TinkerTrainerWrapper"]
    ).TinkerTrainerWrapper
    assert "sampler" not in inspect.getsource(wrapper.save_checkpoint)
    assert IN_MEMORY == {"synchronizer.sync_method": "memory"}


@trinity
def test_an_error_ends_a_half_and_is_reported_as_success() -> None:
    trainer = source("trinity.trainer.trainer", "Trainer")
    explorer = source("trinity.explorer.explorer", "Explorer")
    for words, code in zip(BREAKS, (trainer, explorer), strict=True):
        after = code.partition(words)[2]
        assert after.split("\n")[1].strip() == "break"
    both = source("trinity.cli.launcher", "both")
    assert "timeout=config.synchronizer.sync_timeout" in both and "success=True" in both


@trinity
def test_the_last_weights_are_not_validated() -> None:
    explore = source("trinity.explorer.explorer", "Explorer")
    assert "# TODO: support eval on last checkpoint" in explore


@trinity
def test_trinitys_own_tinker_model_fixes_the_seed() -> None:
    from trinity.common.config import InferenceModelConfig  # type: ignore[import-not-found]

    generate = source("trinity.common.models.tinker_model", "TinkerModel")
    assert '"seed": kwargs.get("seed", self.config.seed)' in generate
    assert InferenceModelConfig().seed == 42


@trinity
def test_a_resumed_explorer_does_not_wait_for_the_resumed_weights() -> None:
    """Its first version is older than the synchronizer's first, and only an equal one waits."""
    synchronizer = source("trinity.manager.synchronizer", "Synchronizer")
    assert "self.model_version = 0" in synchronizer
    assert "if self.model_version == current_version:" in synchronizer
    assert "self.model_version = -1" in source("trinity.explorer.explorer", "Explorer")


@trinity
def test_weights_of_samplers_are_not_deleted() -> None:
    """A service names a checkpoint by its kind too: sampler_weights/NAME."""
    wrapper: Any = __import__(
        "trinity.trainer.tinker.tinker_trainer", fromlist=["TinkerTrainerWrapper"]
    ).TinkerTrainerWrapper
    save = inspect.getsource(wrapper.save_state_dict)
    assert "delete_checkpoint_async(" in save and "self.model_info.model_id, stale" in save
    assert "sampler_weights" not in save


def test_a_break_is_found_in_what_is_new_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "trinity.log"
    log.write_text(f"an earlier attempt: {workarounds.BREAKS[0]}\n")
    breaks = Breaks(log)
    assert not breaks.found()
    with log.open("a") as file:
        file.write("step 1\n")
        file.flush()
        assert not breaks.found()
        file.write("ERROR Error in Explorer: Traceback\n")
    assert breaks.found() and not breaks.found()
    assert not Breaks(tmp_path / "none").found()
