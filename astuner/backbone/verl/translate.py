"""Our configuration as verl's: `to_verl`, and the same in words for `astuner explain`.

Pure and without verl. Every key of the schema is decided in `table`: the verl keys it
sets, or that astuner reads it itself. Raw settings (`astuner.verl`) are merged last and
win; `overridden` says over what. Whether verl knows a key is `compose`'s to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from astuner.backbone import overriding
from astuner.backbone.overriding import announced
from astuner.backbone.spawned.choices import Device, Facts, assumed
from astuner.backbone.spawned.explaining import looked_up, machine
from astuner.backbone.translation import Translation
from astuner.backbone.verl import learning, sections
from astuner.backbone.verl.limits import check, notes, problems
from astuner.backbone.verl.sections import Settings
from astuner.backbone.verl.table import TABLE
from astuner.config.schema import AstunerConfig

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
    unchecked, unknown = looked_up(raw(config), RAW, "verl", _composed)
    told = TABLE.explained(
        _shown(config, None), raw(config), problems(config), [*warnings(config), *unchecked]
    )
    return replace(told, problems=(*told.problems, *unknown), machine=machine(config))


def _composed(settings: Mapping[str, Any]) -> object:
    from astuner.backbone.verl.compose import compose

    return compose(settings, validate=False)


def becomes(config: AstunerConfig) -> Mapping[str, str]:
    """What each key becomes: "verl: KEY=VALUE, ...", "read by astuner itself" or ""."""
    return TABLE.in_words(_shown(config, None), raw(config))


def warnings(config: AstunerConfig, device: Device | None = None) -> list[str]:
    """What a run says before it starts: what verl does a little otherwise, and which of
    astuner's settings are overridden."""
    return [*notes(config, device), *announced(overridden(config, device), RAW)]


def _shown(config: AstunerConfig, device: Device | None) -> Settings:
    run_dir = Path(config.experiment_dir) / config.experiment_name
    return translated(config, run_dir, device or assumed(config), Facts())
