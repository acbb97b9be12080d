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

EXPLAINS: Mapping[str, str] = {
    "verl": "astuner.backbone.verl.translate:translation",
    "trinity": "astuner.backbone.trinity.translate:translation",
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


def translation_of(config: AstunerConfig, backbone: str) -> Translation:
    """By the backbone's own function; empty where it has none."""
    if backbone not in EXPLAINS:
        return Translation()
    module, _, attribute = EXPLAINS[backbone].partition(":")
    return getattr(import_module(module), attribute)(config)
