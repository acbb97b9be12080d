"""What a spawned trainer needs of this machine: its packages, and enough GPUs, or none.

Asked before anything is started. A cluster that is joined by its address may have GPUs
that this machine has not, so there only the configuration counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from astuner.backbone.spawned.choices import Device, wanted_device
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError, MissingDependency


@dataclass(frozen=True)
class Gpus:
    """Those that a configuration asks for, and by which keys."""

    machines: int
    number: int
    """Of this machine."""
    machines_by: str
    """E.g. "`astuner.trainer_common.nnodes`"."""
    by: str
    hint: str
    """What to do where there are fewer."""


def need(packages: Iterable[str], extra: str, how: str) -> None:
    """Raises MissingDependency for the first package that is not there."""
    for package in packages:
        if find_spec(package) is None:
            raise MissingDependency(package, extra, how)


def choose_device(
    config: AstunerConfig,
    gpus: Gpus,
    warn: Callable[[str], None],
    visible: int | None,
    *,
    without: str,
) -> Device:
    """The device to train on. `visible` is the number of GPUs here, None counts them; `without`
    says what happens when there are none.

    Raises ConfigError when there are fewer than the configuration takes.
    """
    wanted = wanted_device(config)
    if wanted == "cpu":
        return "cpu"
    if config.trainer_common.ray_address:
        return "cuda"
    visible = _count() if visible is None else visible
    if visible == 0 and wanted == "cuda":
        raise ConfigError(
            "`astuner.trainer_common.device` is cuda, but no GPU is visible here. Check nvidia-smi "
            f"and CUDA_VISIBLE_DEVICES, or use device: cpu: {without}."
        )
    if visible == 0:
        warn(f"No GPU is visible (`astuner.trainer_common.device` is auto): {without}.")
        return "cpu"
    _check(gpus, visible)
    return "cuda"


def _check(gpus: Gpus, visible: int) -> None:
    if gpus.machines > 1:
        raise ConfigError(
            f"{gpus.machines_by} asks for {gpus.machines} machines, which need a Ray cluster: "
            "`ray start --head` on one, `ray start --address=HEAD:6379` on the others, then start "
            "astuner on any of them with --ray-address auto."
        )
    if gpus.number > visible:
        raise ConfigError(
            f"{gpus.by} asks for {gpus.number} GPUs, but {visible} are visible here. {gpus.hint}"
        )


def _count() -> int:
    import torch

    return torch.cuda.device_count()
