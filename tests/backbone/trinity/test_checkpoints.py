"""Trinity's folders of a run: found, wound back, and the adapter copied."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from astuner.backbone.report import checkpoint_of, saved_step
from astuner.backbone.trinity import checkpoints
from astuner.errors import CheckpointError
from astuner.service.names import parse_path

RUN = "0123456789abcdef0123456789abcdef:train:0"
PATH = f"tinker://{RUN}/weights/checkpoints-trinity-state-4"


def a_run(run_dir: Path) -> Path:
    """After four steps, its sampler a step ahead."""
    folder = run_dir / "checkpoints" / "trinity"
    step = folder / "global_step_4"
    step.mkdir(parents=True)
    (step / "remote_checkpoint_path.txt").write_text(PATH + "\n")
    (folder / "latest_checkpointed_iteration.txt").write_text("4")
    (folder / "latest_state_dict_iteration.txt").write_text("5")
    (folder / "explorer_meta.json").write_text('{"latest_iteration": 6, "taskset_states": []}')
    return folder


def test_the_newest_checkpoint_is_what_trinity_says(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path) is None and saved_step(tmp_path, "trinity") is None
    folder = a_run(tmp_path)
    newest = checkpoints.newest(tmp_path)
    assert newest == folder / "global_step_4"
    assert saved_step(tmp_path, "trinity") == 4 and saved_step(tmp_path, "verl") is None
    assert checkpoints.remote_path(folder / "global_step_4") == PATH


def test_the_explorer_goes_on_where_the_trainer_does(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    (folder / "global_step_5").mkdir()
    (folder / "global_step_5" / "remote_sampler_path.txt").write_text("tinker://x\n")
    assert checkpoints.sampler_path(tmp_path) == "tinker://x"
    checkpoints.rewind(tmp_path, 4, 3)
    state = json.loads((folder / "explorer_meta.json").read_text())
    assert state == {"latest_iteration": 4, "taskset_states": [{"current_index": 12}]}
    assert checkpoints.sampler_path(tmp_path) is None


def test_the_adapter_is_copied_from_the_service(tmp_path: Path) -> None:
    a_run(tmp_path)
    assert checkpoints.service_folder(tmp_path, PATH) is None
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json and no adapter_model"):
        checkpoints.export(tmp_path)
    data = tmp_path / "trinity" / "service" / "data"
    replaced, source = (parse_path(PATH).folder(data / "checkpoints", save) for save in "ba")
    for age, folder in ((9, replaced), (0, source)):
        folder.mkdir(parents=True)
        os.utime(folder, (1e9 - age, 1e9 - age))
    assert checkpoints.service_folder(tmp_path, PATH) == source
    for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt"):
        (source / name).write_text(name)
    model = checkpoints.export(tmp_path)
    assert model == tmp_path / "model"
    assert sorted(p.name for p in model.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert checkpoint_of(tmp_path) == model
