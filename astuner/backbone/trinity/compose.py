"""Trinity's own configuration with our settings in it; a key that Trinity does not know fails.

Trinity's `Config` dataclass, merged by OmegaConf as its `load_config` does, then the names
of parts looked up in its registries. What its own `check_and_update` adds (folders, the
service's models) belongs to the run. This is the only module that imports Trinity to read
its configuration; it starts nothing.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, cast

from astuner.backbone import overriding
from astuner.backbone.trinity.requirements import HOW
from astuner.config.loaded import joined
from astuner.errors import ConfigError, MissingDependency

TRAINER = "trainer.trainer_config"
"""verl's own settings within Trinity's, which its trainer merges (trainer/verl/config.py)."""


def compose(settings: Mapping[str, Any]) -> Any:
    """`trinity.common.config.Config` with these flat settings.

    Raises ConfigError for keys Trinity does not know (all of them, each with the nearest that
    it does), for values of a wrong type, and for parts that do not exist; MissingDependency
    without Trinity.
    """
    schema = config_class()
    unknown = [key for key in settings if not is_known(schema, key)]
    if unknown:
        raise ConfigError(joined([_unknown(schema, key) for key in unknown]))
    config = _merged(schema, nested(settings))
    if problems := list(_missing_parts(config, settings)):
        raise ConfigError(joined(problems))
    return config


def config_class() -> type:
    """Trinity's dataclass."""
    try:
        from trinity.common.config import Config  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependency("trinity-rft", "trinity", HOW) from error
    return cast(type, Config)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same as one tree, as Trinity's YAML has it; numbered entries become lists."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return cast("dict[str, Any]", _with_lists(tree))


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    tree = cast("dict[str, Any]", node)
    if tree and all(key.isdigit() for key in tree):
        return [_with_lists(tree[key]) for key in sorted(tree, key=int)]
    return {key: _with_lists(value) for key, value in tree.items()}


def _merged(schema: type, tree: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), tree))
    except (OmegaConfBaseException, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        key = getattr(error, "full_key", None)
        where = f" at `{key}` (`astuner.trinity.{key}`)" if key else ""
        raise ConfigError(f"Trinity refuses this configuration{where}: {reason}") from error


PARTS: Mapping[str, tuple[str, str]] = {
    "algorithm.algorithm_type": ("trinity.algorithm", "ALGORITHM_TYPE"),
    "algorithm.advantage_fn": ("trinity.algorithm", "ADVANTAGE_FN"),
    "algorithm.policy_loss_fn": ("trinity.algorithm", "POLICY_LOSS_FN"),
    "algorithm.sample_strategy": ("trinity.algorithm", "SAMPLE_STRATEGY"),
    "algorithm.kl_loss_fn": ("trinity.algorithm", "KL_FN"),
    "algorithm.kl_penalty_fn": ("trinity.algorithm", "KL_FN"),
    "algorithm.entropy_loss_fn": ("trinity.algorithm", "ENTROPY_LOSS_FN"),
    "monitor.monitor_type": ("trinity.utils.monitor", "MONITOR"),
}
"""Key -> module and name of the registry that its value is looked up in."""


def _missing_parts(config: Any, settings: Mapping[str, Any]) -> Iterator[str]:
    for key, (module, attribute) in PARTS.items():
        if key not in settings:
            continue
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        registry = getattr(import_module(module), attribute)
        try:
            registry.get(value)
        except (ValueError, ImportError) as error:
            yield f"Trinity has nothing for `{key}` = {value!r} (`astuner.trinity.{key}`): {error}"


# ---------------------------------------------------------------- known keys


def is_known(schema: type, key: str) -> bool:
    """Whether the dotted key leads to a field of the dataclass, or into an open mapping."""
    kind: Any = schema
    for part in key.split("."):
        if part.isdigit():
            (kind,) = typing.get_args(_mapping_or_list(kind)) or (Any,)
            continue
        target = _dataclass(kind)
        if target is None:
            return _is_open(kind)
        fields = _fields(target)
        if part not in fields:
            return False
        kind = fields[part]
    return True


def _fields(target: type) -> dict[str, Any]:
    hints = typing.get_type_hints(target)
    return {field.name: hints[field.name] for field in dataclasses.fields(target)}


def _dataclass(kind: Any) -> type | None:
    """The dataclass that this is, or may be."""
    candidates = (kind, *typing.get_args(kind))
    if typing.get_origin(kind) in (list, dict):
        return None
    return next((cast(type, c) for c in candidates if dataclasses.is_dataclass(c)), None)


def _is_open(kind: Any) -> bool:
    return any(
        k is dict or k is Any or typing.get_origin(k) is dict
        for k in (kind, *typing.get_args(kind))
    )


def _mapping_or_list(kind: Any) -> Any:
    """The list within `Optional[list[...]]`."""
    kinds = (kind, *typing.get_args(kind))
    return next((k for k in kinds if typing.get_origin(k) is list), list[Any])


def _unknown(schema: type, key: str) -> str:
    near = nearest(schema, key)
    hint = f" Did you mean `astuner.trinity.{near}`?" if near else ""
    return f"Trinity knows no setting `{key}` (`astuner.trinity.{key}`).{hint}"


def nearest(schema: type, key: str) -> str | None:
    """Trinity's setting that a mistyped `key` most likely means."""
    return overriding.nearest(_all_keys(schema, ""), key)


def _all_keys(target: type, prefix: str) -> Iterator[str]:
    for name, kind in _fields(target).items():
        inner = _dataclass(kind)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from _all_keys(inner, f"{prefix}{name}.")
