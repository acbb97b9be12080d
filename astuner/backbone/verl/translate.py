"""Our configuration as verl's: `to_verl`, and the same in words for `astuner explain`.

Pure and without verl. Every key of the schema is decided in `table`: the verl keys it
sets, or that astuner reads it itself. Raw settings (`astuner.verl`) are merged last and
win; `overridden` says over what. Whether verl knows a key is `compose`'s to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from astuner.backbone import overriding
from astuner.backbone.overriding import announced, pair
from astuner.backbone.spawned.choices import Device, Facts, assumed
from astuner.backbone.translation import Translation
from astuner.backbone.verl import learning, sections
from astuner.backbone.verl.limits import check, notes, problems
from astuner.backbone.verl.sections import Settings
from astuner.backbone.verl.table import BECOMES, READ_HERE, REMARKS, UNUSED
from astuner.config.keys import keys
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError

__all__ = [
    "becomes",
    "check",
    "notes",
    "overridden",
    "raw",
    "to_verl",
    "translation",
    "warnings",
]

raw = sections.raw

ITSELF = "read by astuner itself"
RAW = "verl"


def to_verl(
    config: AstunerConfig,
    *,
    run_dir: Path,
    device: Device,
    resume: bool = False,
    facts: Facts = Facts(),  # noqa: B008 (frozen)
) -> Settings:
    """Flat dotted verl keys and their values, raw settings included.

    Raises ConfigError when verl cannot honour the configuration.
    """
    check(config, device)
    return translated(config, run_dir, device, facts, resume=resume) | raw(config)


def translated(
    config: AstunerConfig, run_dir: Path, device: Device, facts: Facts, *, resume: bool = False
) -> Settings:
    """The same without the raw settings, and unchecked."""
    return {
        **sections.cluster(config, device),
        **sections.model(config, device, facts),
        **sections.precision(config, device),
        **sections.data(config),
        **sections.rollout(config, device, facts),
        **sections.mode(config, device),
        **learning.algorithm(config),
        **learning.optimizer(config),
        **learning.batches(config),
        **learning.compilation(device),
        **sections.schedule(config, run_dir, facts, resume=resume),
    }


# ---------------------------------------------------------------- raw settings


def overridden(config: AstunerConfig, device: Device | None = None) -> dict[str, tuple[Any, Any]]:
    """verl's keys that a raw setting changes: what they would be, and what they are."""
    return overriding.overridden(_shown(config, device), raw(config))


# ---------------------------------------------------------------- in words


def translation(config: AstunerConfig) -> Translation:
    """The translation for the device that the configuration names; for GPUs if it names none."""
    named = {key for of_key in BECOMES.values() for key in of_key}
    everything = _shown(config, None)
    refused = [f"`astuner.{key}` {message}" for key, message in problems(config)]
    unchecked, unknown = _known_to_verl(raw(config))
    return Translation(
        becomes(config),
        {key: value for key, value in everything.items() if key not in named},
        (*warnings(config), *unchecked),
        (*refused, *unknown),
    )


def _known_to_verl(settings: Settings) -> tuple[list[str], list[str]]:
    """A note that this cannot be seen here, or what is wrong. Slow, where there is something to
    see: verl is imported."""
    if not settings:
        return [], []
    if find_spec("verl") is None:
        return ["Whether verl knows what is under `astuner.verl` shows where it is installed."], []
    from astuner.backbone.verl.compose import compose

    try:
        compose(settings, validate=False)
    except ConfigError as error:
        return [], [str(error)]
    return [], []


def becomes(config: AstunerConfig) -> Mapping[str, str]:
    """What each key becomes: "verl: KEY=VALUE, ...", "read by astuner itself" or ""."""
    settings = _shown(config, None)
    replaced = overridden(config)
    return {name: _in_words(name, settings, replaced, config) for name in keys()}


def _in_words(
    name: str, settings: Settings, replaced: Mapping[str, tuple[Any, Any]], config: AstunerConfig
) -> str:
    if name == RAW:
        pairs = [pair(key, value, replaced, RAW) for key, value in raw(config).items()]
        return f"verl: {', '.join(pairs)}" if pairs else "nothing"
    remark = f" ({REMARKS[name]})" if name in REMARKS else ""
    if any(name == key or (key[-1] == "." and name.startswith(key)) for key in READ_HERE):
        return f"{ITSELF}{remark}"
    pairs = [
        pair(key, settings[key], replaced, RAW) for key in BECOMES.get(name, ()) if key in settings
    ]
    if pairs:
        return f"verl: {', '.join(pairs)}{remark}"
    return f"not used ({UNUSED[name]})" if name in UNUSED else ""


def warnings(config: AstunerConfig, device: Device | None = None) -> list[str]:
    """What a run says before it starts: what verl does a little otherwise, and which of
    astuner's settings are overridden."""
    return [*notes(config, device), *announced(overridden(config, device), RAW)]


def _shown(config: AstunerConfig, device: Device | None) -> Settings:
    run_dir = Path(config.experiment_dir) / config.experiment_name
    return translated(config, run_dir, device or assumed(config), Facts())
