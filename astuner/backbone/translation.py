"""What a backbone says of a configuration before it runs: for `astuner explain`.

A backbone with a configuration of its own names a function `(config) -> Translation` in
`EXPLAINS`; it must be light, and must not need the packages that the run needs. The
others read the keys as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from astuner.config.schema import AstunerConfig
from astuner.config.targets import KEY, Target, targets_of

EXPLAINS: Mapping[str, str] = {
    "local": "astuner.backbone.translation:of_targets",
    "debug": "astuner.backbone.translation:of_targets",
    "verl": "astuner.backbone.verl.translate:translation",
    "trinity": "astuner.backbone.trinity.translate:translation",
    "tinker": "astuner.backbone.tinker.translate:translation",
}


@dataclass(frozen=True)
class Translation:
    becomes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Key (without the root) -> what it becomes; see `config.explain.explain`."""
    always: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The backbone's own settings that are the same whatever the configuration says."""
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """What would keep the run from starting."""
    machine: str = ""
    """For which machine this is said, where the configuration leaves that open."""


def translation_of(config: AstunerConfig, backbone: str) -> Translation:
    """By the backbone's own function; empty where it has none."""
    if backbone not in EXPLAINS:
        return Translation()
    module, _, attribute = EXPLAINS[backbone].partition(":")
    return getattr(import_module(module), attribute)(config)


def of_targets(config: AstunerConfig) -> Translation:
    """What `model.targets` means to the backbones that read it; other keys are read as they
    are."""
    debug = config.backbone == "debug"

    def told(target: Target) -> str:
        return (
            "the base, as nothing is trained here" if debug and not target.endpoint else str(target)
        )

    named = [f"{tag}: {told(target)}" for tag, target in targets_of(config).items()]
    rest = "all other tags: the base" if debug else "all other tags: the shared adapter"
    return Translation({KEY: "; ".join([*named, rest])} if named else {})
