"""Every shipped configuration can be run as it is: loaded, complete, its names found."""

from __future__ import annotations

from pathlib import Path

import pytest

from astuner.backbone.translation import translation_of
from astuner.backbone.trinity.translate import to_trinity
from astuner.backbone.verl.translate import to_verl
from astuner.config.load import check_backbone, check_complete, load_config
from astuner.loading import load_object
from astuner.task_judge import make_judge
from astuner.task_runner.workflow import check_workflow
from astuner.trainer import TrainSettings

from .artefacts import CONFIGS, PAGES, ROOT, SIDE_PAGES, blocks, name_of

SERVICE_PAGE = "service.md"
"""Its YAML configures a service: test_service_pages.py."""


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
    named = [name for name in ("verl", "trinity") if name in path.name]
    assert config.backbone == (named or ["local"])[0]
    told = translation_of(config, config.backbone)
    assert (told.problems, told.notes) == ((), ())


@pytest.mark.parametrize(
    ("name", "gpus", "settings"),
    [
        ("math_verl", 1, {"actor_rollout_ref.model.lora_rank": 16, "data.train_batch_size": 16}),
        ("math_verl_1gpu", 1, {"trainer.n_gpus_per_node": 1, "trainer.save_freq": 10}),
        ("math_verl_8gpu", 8, {"trainer.nnodes": 1, "actor_rollout_ref.model.lora_rank": 0}),
        ("math_verl_16gpu", 16, {"trainer.nnodes": 2, "trainer.n_gpus_per_node": 8,
                                 "actor_rollout_ref.actor.ppo_mini_batch_size": 128}),
    ],
)  # fmt: skip
def test_a_config_for_gpus_becomes_verls(name: str, gpus: int, settings: dict[str, object]) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml").config
    told = to_verl(config, run_dir=Path("/runs/x"), device="cuda")
    assert told["trainer.nnodes"] * told["trainer.n_gpus_per_node"] == gpus
    assert {key: told[key] for key in settings} == settings
    assert told["trainer.total_training_steps"] == config.trainer_common.total_steps


@pytest.mark.parametrize("path", [p for p in PAGES if p.name != SERVICE_PAGE], ids=name_of)
def test_yaml_on_a_page_is_a_configuration(path: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(path, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        check_complete(load_config(file))


@pytest.mark.parametrize("path", SIDE_PAGES, ids=name_of)
def test_yaml_of_an_environment_is_part_of_a_configuration(path: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(path, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        env = load_config(file).config.env
        assert path.parent.name in (env.type, env.service)


@pytest.mark.parametrize(
    ("name", "gpus", "settings"),
    [
        ("math_trinity", 2, {"mode": "both", "explorer.rollout_model.engine_num": 1,
                             "synchronizer.sync_method": "nccl"}),
        ("math_trinity_1gpu", 1, {"mode": "colocate", "synchronizer.sync_style": "fixed"}),
        ("math_trinity_8gpu", 8, {"explorer.rollout_model.engine_num": 4,
                                  "algorithm.policy_loss_fn_args.processes": 4}),
        ("math_trinity_service", 1, {"trainer.trainer_type": "tinker", "model.tinker.rank": 16}),
    ],
)  # fmt: skip
def test_a_config_becomes_trinitys(name: str, gpus: int, settings: dict[str, object]) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml").config
    told = to_trinity(config, run_dir=Path("/runs/x"), service_url="http://x", device="cuda")
    assert told["cluster.node_num"] * told["cluster.gpu_per_node"] == gpus
    assert {key: told[key] for key in settings} == settings
    assert told["trainer.total_steps"] == config.trainer_common.total_steps
