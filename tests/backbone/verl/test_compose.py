"""The translation in verl's own configuration: known keys, verl's own checks, raw settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from astuner.backbone.spawned.choices import Device
from astuner.backbone.verl import reserved
from astuner.backbone.verl.compose import compose, defaults, nearest
from astuner.backbone.verl.translate import to_verl
from astuner.config.load import load_config
from astuner.errors import ConfigError, MissingDependency

pytestmark = pytest.mark.verl

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("math_verl*.yaml"))
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
ASYNC = ("rollout.mode=async", "rollout.max_staleness=1")
UNPACKED = {f"{ROLLOUT}.name": "embedded", f"{ROLLOUT}.checkpoint_engine.backend": "naive"}
"""Without the packages of GPU machines, for verl's checks of all the rest."""


def settings(*overrides: str, device: Device = "cpu", path: Path | None = None) -> dict[str, Any]:
    config = load_config(path, overrides, backbone="verl").config
    return to_verl(config, run_dir=Path("/runs/x"), device=device)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ASYNC,
        ("trainer_common.use_kl_loss=true", "trainer_common.kl_loss_type=k1"),
        ("model.lora.enable=false",),
        ("trainer_common.algorithm.loss=gspo", "trainer_common.algorithm.tis_cap=0"),
        ("trainer_common.optim.warmup_steps=3", "trainer_common.optim.max_grad_norm=0"),
        ("trainer_common.mini_batch_num=2", "trainer_common.algorithm.loss_agg_mode=constant"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_verl_takes_what_we_translate(overrides: tuple[str, ...], device: Device) -> None:
    wanted = settings(*overrides, device=device)
    config = compose(wanted, validate=False)
    assert {key: _plain(config, key) for key in wanted} == wanted
    compose(wanted | UNPACKED)


def _plain(config: Any, key: str) -> Any:
    from omegaconf import OmegaConf

    value = OmegaConf.select(config, key)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        ((), MissingDependency, 'engine \'vllm\' needs .* pip install "astuner\\[verl\\]"'),
        (("rollout.engine=sglang",), ConfigError, "pip cannot install it beside verl"),
        ((*ASYNC, "verl.actor_rollout_ref.rollout.name=embedded"), MissingDependency,
         "Passing weights from one pool .* needs the package 'cupy'"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_installed_is_named_before_anything_starts(
    overrides: tuple[str, ...], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from astuner.backbone.verl import compose as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(kind, match=message):
        compose(settings(*overrides, device="cuda"))


@pytest.mark.parametrize(
    ("key", "near"),
    [
        (f"{ACTOR}.entropy_coef", f"{ACTOR}.entropy_coeff"),
        ("trainer.sav_freq", "trainer.save_freq"),
        (f"{ROLLOUT}.gpu_memory_utilisation", f"{ROLLOUT}.gpu_memory_utilization"),
        (f"{ACTOR}.clip_ratio", f"{ACTOR}.clip_ratio"),
        ("algorithm.entropy_coeff", f"{ACTOR}.entropy_coeff"),
    ],
)
def test_a_mistyped_verl_key_offers_the_nearest(key: str, near: str) -> None:
    assert nearest(defaults(), key) == near
    if key != near:
        with pytest.raises(ConfigError) as caught:
            compose({key: 1})
        assert str(caught.value) == (
            f"verl knows no setting `{key}` (`astuner.verl.{key}`). "
            f"Did you mean `astuner.verl.{near}`?"
        )


def test_vllm_for_cpus_has_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from astuner.backbone.verl import compose as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"scripts/install.py --env verl-vllm-cpu"):
        compose(settings("rollout.engine=vllm"))


def test_all_unknown_keys_come_at_once() -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        compose({"trainer.sav_freq": 1, "data.no_such_thing_at_all": 2})


@pytest.mark.parametrize(
    "key",
    [
        f"{ROLLOUT}.engine_kwargs.vllm.swap_space",  # open by its type
        f"{ROLLOUT}.enable_sleep_mode",  # only in verl's dataclass
        f"{ROLLOUT}.agent.agent_loop_manager_class",  # likewise, one below
        f"{ACTOR}.optim.override_optimizer_config.eps",  # null by default
        "actor_rollout_ref.model.override_config.rope_scaling.factor",  # empty by default
        "ray_kwargs.ray_init.num_gpus",  # handed on as they are
    ],
)
def test_keys_that_are_not_in_verls_yaml_but_known(key: str) -> None:
    from omegaconf import OmegaConf

    assert OmegaConf.select(compose({key: 5}, validate=False), key) == 5


def test_what_verl_refuses_is_a_config_error() -> None:
    wanted = settings(f"verl.{ACTOR}.loss_agg_mode=mean-of-means")
    with pytest.raises(ConfigError, match=r"verl refuses.*mean-of-means"):
        compose(wanted)


def test_what_is_reserved_is_in_verls_configuration() -> None:
    """A name that verl has given up would protect nothing."""
    from omegaconf import OmegaConf

    ours = ("runtime_env", "ray_init.address", "agent_loop_manager_class")
    known = defaults()
    for key in [*reserved.NEEDED, *reserved.INSTEAD, *reserved.FREE]:
        if not any(name in key for name in ours):  # not in its YAML
            assert OmegaConf.select(known, key, default="absent") != "absent", key


def test_raw_settings_win() -> None:
    config = compose(settings(f"verl.{ACTOR}.entropy_coeff=0.01", f"verl.{ACTOR}.optim.lr=0.5"))
    assert (
        config.actor_rollout_ref.actor.entropy_coeff,
        config.actor_rollout_ref.actor.optim.lr,
    ) == (0.01, 0.5)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_shipped_configs_are_taken(path: Path, device: Device) -> None:
    wanted = settings(path=path, device=device)
    compose(wanted, validate=False)
    compose(wanted | UNPACKED)


def test_the_asynchronous_variant_that_a_shipped_config_names() -> None:
    overrides = (*ASYNC, "rollout.n_gpus_per_node=4", "trainer_common.n_gpus_per_node=4")
    wanted = settings(*overrides, path=ROOT / "configs/math_verl_8gpu.yaml", device="cuda")
    assert wanted["trainer.v1.separate_async.num_warmup_batches"] == 1
    compose(wanted | UNPACKED)
