"""Our configuration as Trinity's: `to_trinity`, and the same in words for `astuner explain`.

Pure and without Trinity. Every key of the schema is decided in `table`: the keys of
Trinity's `Config` that it sets, or that astuner reads it itself. Raw settings
(`astuner.trinity`) are merged last and win; `overridden` says over what. Whether Trinity
knows a key is `compose`'s to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from astuner.backbone import overriding
from astuner.backbone.overriding import announced, flat
from astuner.backbone.spawned.choices import Device, Facts, assumed
from astuner.backbone.spawned.explaining import looked_up, machine
from astuner.backbone.translation import Translation
from astuner.backbone.trinity import learning, processes, sections
from astuner.backbone.trinity.compose import compose
from astuner.backbone.trinity.limits import check, notes, problems
from astuner.backbone.trinity.sections import Settings
from astuner.backbone.trinity.table import TABLE
from astuner.config.schema import AstunerConfig

__all__ = [
    "becomes",
    "check",
    "notes",
    "overridden",
    "raw",
    "route",
    "to_trinity",
    "translation",
    "warnings",
]

raw, route = sections.raw, sections.route

RAW = "trinity"


def to_trinity(
    config: AstunerConfig,
    *,
    run_dir: Path,
    service_url: str | None,
    device: Device,
    resume: bool = False,
    facts: Facts = Facts(),  # noqa: B008 (frozen)
) -> Settings:
    """Flat dotted keys of Trinity's `Config` and their values, raw settings included.

    `service_url` is where the service that `route` asks for listens; None with "vllm".
    Raises ConfigError when Trinity cannot honour the configuration.
    """
    check(config, device)
    return translated(config, run_dir, service_url, device, facts, resume=resume) | raw(config)


def translated(
    config: AstunerConfig,
    run_dir: Path,
    service_url: str | None,
    device: Device,
    facts: Facts,
    *,
    resume: bool = False,
) -> Settings:
    """The same without the raw settings, and unchecked."""
    way = route(config, device)
    told = {
        **sections.general(config, run_dir, way, resume=resume),
        **sections.model(config, way, facts, service_url),
        **processes.cluster(config, way),
        **sections.buffer(config, run_dir, facts),
        **processes.explorer(config, way, facts),
        **processes.trainer(config, way, facts),
        **processes.synchronizer(config, way),
        **learning.algorithm(config, way),
        **learning.optimizer(config),
    }
    return flat(told, lists=True)


# ---------------------------------------------------------------- raw settings


def overridden(config: AstunerConfig, device: Device | None = None) -> dict[str, tuple[Any, Any]]:
    """Trinity's keys that a raw setting changes: what they would be, and what they are."""
    return overriding.overridden(_shown(config, device), raw(config))


# ---------------------------------------------------------------- in words


def translation(config: AstunerConfig) -> Translation:
    """The translation for the device that the configuration names; for GPUs if it names none."""
    unchecked, unknown = looked_up(raw(config), RAW, "Trinity", compose)
    told = TABLE.explained(
        _shown(config, None), raw(config), problems(config), [*warnings(config), *unchecked]
    )
    return replace(told, problems=(*told.problems, *unknown), machine=machine(config))


def becomes(config: AstunerConfig) -> Mapping[str, str]:
    """What each key becomes: "trinity: KEY=VALUE, ...", "read by astuner itself" or ""."""
    return TABLE.in_words(_shown(config, None), raw(config))


def warnings(config: AstunerConfig, device: Device | None = None) -> list[str]:
    """What a run says before it starts: what Trinity does a little otherwise, and which of
    astuner's settings are overridden."""
    return [*notes(config, device), *announced(overridden(config, device), RAW)]


def _shown(config: AstunerConfig, device: Device | None) -> Settings:
    run_dir = Path(config.experiment_dir) / config.experiment_name
    return translated(config, run_dir, None, device or assumed(config), Facts())
