"""The translation in Trinity's own configuration: known keys, its own checks, raw settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from astuner.backbone.overriding import flat
from astuner.backbone.spawned.choices import Device
from astuner.backbone.spawned.explaining import looked_up
from astuner.backbone.trinity.compose import (
    PARTS,
    compose,
    config_class,
    is_known,
    nearest,
    nested,
)
from astuner.backbone.trinity.limits import LIFTED_BY
from astuner.backbone.trinity.reserved import INSTEAD
from astuner.backbone.trinity.translate import to_trinity, translation
from astuner.config.load import load_config
from astuner.errors import ConfigError

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("math_trinity*.yaml"))
FULL = ("model.lora.enable=false",)


def settings(
    *overrides: str, device: Device = "cpu", path: Path | None = None, run_dir: Path = Path("/x")
) -> dict[str, Any]:
    config = load_config(path, overrides, backbone="trinity").config
    url = "http://127.0.0.1:1" if device == "cpu" else None
    return to_trinity(config, run_dir=run_dir, service_url=url, device=device)


def at(config: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(config, list):
            config = config[int(part)]
        else:
            config = config[part] if isinstance(config, dict) else getattr(config, part)
    return getattr(config, "value", config)


@pytest.mark.trinity
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("rollout.mode=sync", "trainer_common.n_gpus_per_node=1"),
        ("rollout.max_staleness=3", "trainer_common.use_kl_loss=true"),
        ("trainer_common.algorithm.loss=gspo", "trainer_common.algorithm.tis_cap=0"),
        ("trainer_common.optim.warmup_steps=3", "trainer_common.optim.max_grad_norm=0"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_trinity_takes_what_we_translate(overrides: tuple[str, ...], device: Device) -> None:
    wanted = settings(*overrides, device=device)
    config = compose(wanted)
    assert {key: at(config, key) for key in wanted} == wanted


@pytest.mark.trinity
@pytest.mark.parametrize("colocated", [False, True])
def test_trinitys_own_checks_change_nothing_that_we_set(tmp_path: Path, colocated: bool) -> None:
    """For GPUs: on a service they ask the service, which is part of a whole run's test."""
    mode = ("rollout.mode=sync", "trainer_common.n_gpus_per_node=1", "rollout.num_repeat=2")
    folder = str(ROOT / "configs")
    wanted = settings(
        *FULL, f"model.path={folder}", *(mode if colocated else ()), device="cuda", run_dir=tmp_path
    )
    checked = compose(wanted).check_and_update()
    moved = "buffer.explorer_input.taskset"
    kept = {key: value for key, value in wanted.items() if not key.startswith(moved)}
    if colocated:  # a quarter of the memory is the most that Trinity allows there
        kept["explorer.rollout_model.gpu_memory_utilization"] = 0.25
    assert {key: at(checked, key) for key in kept} == kept
    gpus = checked.cluster
    assert (gpus.rollout_gpu_num, gpus.trainer_gpu_num) == ((1, 1) if colocated else (1, 8))


@pytest.mark.trinity
@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("synchronizer.sync_intervall", "synchronizer.sync_interval"),
        ("algorithm.optimizer.lrr", "algorithm.optimizer.lr"),
        ("model.tinker.rnk", "model.tinker.rank"),
        ("explorer.runner_num_per_model", "explorer.runner_per_model"),
    ],
)
def test_a_mistyped_key_offers_the_nearest(key: str, near: str) -> None:
    assert nearest(config_class(), key) == near
    with pytest.raises(ConfigError) as caught:
        compose({key: 1})
    assert str(caught.value) == (
        f"Trinity knows no setting `{key}` (`astuner.trinity.{key}`). "
        f"Did you mean `astuner.trinity.{near}`?"
    )


@pytest.mark.trinity
def test_all_unknown_keys_come_at_once() -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        compose({"trainer.sav_interval": 1, "buffer.no_such_thing_at_all": 2})


@pytest.mark.trinity
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("synchronizer.sync_style", "sometimes", "at `synchronizer.sync_style` (`astuner.trinity"),
        ("synchronizer.sync_interval", "often", "Value 'often' of type 'str' could not be conv"),
        ("algorithm.kl_loss_fn", "k9", "nothing for `algorithm.kl_loss_fn` = 'k9'"),
        ("algorithm.advantage_fn", "no.such.Thing", "= 'no.such.Thing' (`astuner.trinity.algor"),
    ],
)
def test_what_trinity_refuses_is_a_config_error(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose({key: value})
    assert message in str(caught.value)


@pytest.mark.trinity
@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("explorer.rollout_model.extra_engine_args.max_num_seqs", True),  # open by its type
        ("trainer.trainer_config.actor.optim.num_cycles", True),
        ("algorithm.rollout_correction.rollout_is", True),  # a mapping, null by default
        ("buffer.explorer_input.eval_tasksets.0.repeat_times", True),
        ("buffer.explorer_input.eval_tasksets.0.repeat", False),
        ("buffer.explorer_input.taskset.format.prompt_key", True),
        ("model.lora_configs.0.lora_rank", True),
        ("model.lora_configs.0.rank", False),
        ("buffer.trainer_input.experience_buffer.capacity", True),
        ("buffer.batch_size.more", False),
        ("nothing", False),
    ],
)
def test_which_keys_are_known(key: str, known: bool) -> None:
    assert is_known(config_class(), key) == known


@pytest.mark.trinity
def test_raw_settings_win() -> None:
    config = compose(settings("trinity.algorithm.optimizer.lr=0.5", "trinity.log.level=DEBUG"))
    assert (config.algorithm.optimizer.lr, config.log.level) == (0.5, "DEBUG")


@pytest.mark.trinity
def test_explain_says_what_trinity_does_not_know() -> None:
    def asked(raw: dict[str, str]) -> tuple[list[str], list[str]]:
        return looked_up(raw, "trinity", "Trinity", compose)

    assert asked({}) == asked({"log.level": "DEBUG"}) == ([], [])
    notes, [problem] = asked({"log.levl": "DEBUG"})
    assert notes == [] and problem.endswith("Did you mean `astuner.trinity.log.level`?")


def test_without_trinity_explain_says_that_it_cannot_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astuner.backbone.spawned.explaining.find_spec", lambda name: None)
    told = translation(load_config(None, ["trinity.log.levl=DEBUG"], backbone="trinity").config)
    assert any(n.startswith("Whether Trinity knows what is under") for n in told.notes)
    assert not any("levl" in problem for problem in told.problems)


@pytest.mark.trinity
def test_what_we_name_is_in_trinitys_configuration() -> None:
    """A name that Trinity has given up would protect nothing."""
    schema = config_class()
    names = [*INSTEAD, *LIFTED_BY.values(), *PARTS]
    assert [name for name in names if not is_known(schema, name)] == []


def test_flat_keys_and_the_tree_are_the_same() -> None:
    tree = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": [{"f": 1}, {"f": 2, "g": {"h": None}}]}
    keys = flat(tree, lists=True)
    assert keys == {"a.b": 1, "a.c.d": [1, 2], "e.0.f": 1, "e.1.f": 2, "e.1.g.h": None}
    assert nested(keys) == tree


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_shipped_configurations_are_translated(path: Path) -> None:
    device: Device = "cpu" if "service" in path.name else "cuda"
    way = {"cpu": "tinker", "cuda": "vllm"}[device]
    told = settings(path=path, device=device)
    assert told["explorer.rollout_model.engine_type"] == way


@pytest.mark.trinity
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_trinity_takes_the_shipped_configurations(path: Path) -> None:
    compose(settings(path=path, device="cpu" if "service" in path.name else "cuda"))
