"""What becomes of every key, and what is refused by name before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from astuner.backbone.lora_parts import lora_parts
from astuner.backbone.tinker.translate import BECOMES, check, translation
from astuner.backbone.translation import translation_of
from astuner.cli import main
from astuner.config.explain import explain
from astuner.config.keys import keys
from astuner.config.load import check_backbone, check_complete, load_config
from astuner.config.readers import why_unread
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError

SELF = {
    "project_name", "experiment_name", "experiment_dir", "backbone",
    "model.renderer", "model.template_kwargs", "model.lora.enable",
    "service.api_key_env", "service.timeout", "service.outage_timeout", "service.download",
}  # fmt: skip
"""Read by astuner itself, as `local` reads them; with the sections below."""
SECTIONS = (
    "data.", "rollout.", "task_reader.", "task_judge.", "context_tracker.", "model_tuner.",
    "trainer_common.", "env.",
)  # fmt: skip
THE_SERVICES = {
    "model.device", "model.dtype", "model.lora.alpha", "rollout.max_num_seqs",
    "rollout.kv_cache_tokens", "trainer_common.micro_batch_tokens",
    "trainer_common.gradient_checkpointing",
}  # fmt: skip


def test_every_key_is_decided() -> None:
    undecided = [
        name
        for name, key in keys().items()
        if name not in BECOMES | dict.fromkeys(SELF | THE_SERVICES)
        and not name.startswith(SECTIONS)
        and (not key.backbones or "tinker" in key.backbones)
    ]
    assert undecided == []
    assert set(BECOMES) <= set(keys())


def test_what_the_service_decides_is_not_read_here() -> None:
    config = AstunerConfig(backbone="tinker")
    unread = {name for name in keys() if why_unread(config, name, "tinker") == "it is the "
              "service's own choice"}  # fmt: skip
    assert unread == THE_SERVICES


def test_explain_names_the_requests() -> None:
    loaded = load_config(None, ["service.base_url=http://x"], backbone="tinker")
    told = translation_of(loaded.config, "tinker")
    rows = {row.key: row.becomes for row in explain(loaded, "tinker", told.becomes)}
    assert rows["astuner.model.lora.rank"] == "create_model: lora_config.rank"
    assert rows["astuner.trainer_common.optim.lr"] == "optim_step: adam_params.learning_rate"
    assert rows["astuner.model.dtype"] == "not used (it is the service's own choice)"
    assert rows["astuner.verl"] == "not used (only verl read it)"
    assert told.problems == ()
    assert len(told.notes) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.lora.enable=false", "trains LoRA adapters only"),
        ("model.lora.target_modules=[q_proj]", "names q_proj, but the Tinker API chooses whole"),
        ("rollout.temperature=0.7", "is 0.7, but the Tinker API trains the distribution at"),
    ],
)
def test_what_the_api_cannot_say_is_refused(override: str, message: str) -> None:
    name, _, value = override.partition("=")
    config = load_config(None, [f"{name}={value.strip('[]')}"], backbone="tinker").config
    with pytest.raises(ConfigError, match=message) as caught:
        check(config)
    assert f"`astuner.{name}`" in str(caught.value)
    assert any(name in problem for problem in translation(config).problems)


def test_all_problems_at_once() -> None:
    overrides = ["rollout.temperature=2", "model.lora.target_modules=x,attn"]
    with pytest.raises(ConfigError, match="2 problems"):
        check(load_config(None, overrides, backbone="tinker").config)


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        ("all-linear", (True, True, False)),
        ("attn", (True, False, False)),
        ("mlp, unembed", (False, True, True)),
    ],
)
def test_parts_of_the_model(targets: str, parts: tuple[bool, bool, bool]) -> None:
    assert tuple(lora_parts(targets).values()) == parts
    assert list(lora_parts(targets)) == ["train_attn", "train_mlp", "train_unembed"]


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["trainer_common.algorithm.loss=dro"], "does not have the loss dro"),
        (["trainer_common.use_kl_loss=true"], "no KL term"),
        (
            ["trainer_common.algorithm.loss=gspo", "trainer_common.mini_batch_num=2"],
            "does not have the loss gspo",
        ),
        (["trainer_common.mini_batch_num=2"], ""),
        (["trainer_common.algorithm.loss=gspo"], ""),
        (["trainer_common.algorithm.tis_cap=0"], ""),
    ],
)
def test_who_pays_for_another_forward_pass(overrides: list[str], word: str) -> None:
    told = translation(load_config(None, overrides, backbone="tinker").config)
    assert any(word in note for note in told.notes[1:]) if word else len(told.notes) == 1


def test_the_service_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_config(None, ["rollout.user_workflow=a.b->C"], backbone="tinker")
    with pytest.raises(ConfigError, match=r"astuner\.service\.base_url` must be set, because"):
        check_complete(loaded, tasks=True, judge=True)
    path = tmp_path / "x.yaml"
    path.write_text("astuner: {}\n")
    assert main(["explain", "--conf", str(path), "--backbone", "tinker"]) == 2
    assert "`astuner.service.base_url` must be set" in capsys.readouterr().err


def test_keys_of_others_are_refused_and_the_services_own_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("astuner:\n  model: {dtype: float32}\n")
    loaded = load_config(path, backbone="tinker")
    assert check_backbone(loaded, "tinker") == [
        f"{path}:2: `astuner.model.dtype` is set but not read: it is the service's own choice."
    ]
    other: Any = load_config(None, ["service.base_url=http://x"])
    with pytest.raises(ConfigError, match="only tinker read it"):
        check_backbone(other, "local")
