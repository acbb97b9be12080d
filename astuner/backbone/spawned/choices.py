"""What a configuration means to every trainer with processes of its own.

Pure. Which keys become which of the trainer's own is the backbone's `translate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from astuner.config.keys import full
from astuner.config.schema import AstunerConfig

Device = Literal["cuda", "cpu"]
Problem = tuple[str, str]
"""A key of astuner's, and what is wrong with it."""

NEVER = 1_000_000_000
"""Steps: only the last one is due."""


@dataclass(frozen=True)
class Facts:
    """What only the machine and the data tell; each 0 or "" where it is not known yet."""

    model_path: str = ""
    """The folder that `model.path` stands for, or the name that a service has for it."""
    model_context: int = 0
    """The model's own limit, in tokens."""
    total_steps: int = 0
    """Of the whole run, whether from total_steps or total_epochs."""
    validation: bool = True
    """Whether there are validation tasks."""
    flash_attention: bool = True
    """Whether the trainer finds the package flash-attn."""


def wanted_device(config: AstunerConfig) -> str:
    """ "cuda", "cpu", or "auto" where the configuration leaves it open."""
    chosen = config.trainer_common.device
    if chosen == "auto" and config.model.device in ("cuda", "cpu"):
        return config.model.device
    return chosen


def assumed(config: AstunerConfig) -> Device:
    """The device as far as the configuration says; GPUs where it leaves it open."""
    return "cpu" if wanted_device(config) == "cpu" else "cuda"


def two_devices(config: AstunerConfig) -> Iterator[Problem]:
    """The device is chosen twice, and not alike."""
    chosen = config.trainer_common.device
    if (
        chosen != "auto"
        and config.model.device in ("cuda", "cpu")
        and config.model.device != chosen
    ):
        yield (
            "model.device",
            f"is {config.model.device!r}, but `{full('trainer_common.device')}` is {chosen!r}. "
            "Set one of them.",
        )


def save_every(config: AstunerConfig) -> int:
    """Steps between the trainer's checkpoints, of which `keeping` says which stay."""
    lasting, rolling = config.trainer_common.save_freq, config.trainer_common.resume_freq
    return math.gcd(lasting, rolling) or NEVER
