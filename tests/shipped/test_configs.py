"""Every shipped configuration can be run as it is: loaded, complete, its names found."""

from __future__ import annotations

from pathlib import Path

import pytest

from astuner.config.load import check_backbone, check_complete, load_config
from astuner.loading import load_object
from astuner.task_judge import make_judge
from astuner.task_runner.workflow import check_workflow
from astuner.trainer import TrainSettings

from .artefacts import CONFIGS, PAGES, blocks, name_of


def test_there_are_some() -> None:
    assert {"quickstart.yaml", "gsm8k.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_can_be_run(path: Path) -> None:
    loaded = load_config(path)
    config = loaded.config
    check_complete(loaded)
    assert check_backbone(loaded, config.backbone) == []
    check_workflow(load_object(config.rollout.user_workflow, "rollout.user_workflow"))
    judge = make_judge(config.task_judge)
    assert (judge is None) == (config.task_judge.judge_type == "none")
    settings = TrainSettings.from_config(config, steps_per_epoch=10)
    assert settings.total_steps == config.trainer_common.total_steps
    assert config.backbone == "local"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_yaml_on_a_page_is_a_configuration(path: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(path, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        check_complete(load_config(file))
