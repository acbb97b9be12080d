"""What a run with verl needs of this machine: the package, and enough GPUs, or none."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from astuner.backbone.spawned import devices
from astuner.backbone.spawned.choices import Device
from astuner.backbone.spawned.devices import Gpus
from astuner.backbone.verl.sections import is_async
from astuner.config.schema import AstunerConfig

PACKAGES = ("verl", "ray", "cloudpickle")
ON_CPU = (
    "The verl backbone (for machines with GPUs; to try it out without one, from a checkout: "
    "`python scripts/install.py --env verl -- astuner ...`)"
)


def need_verl() -> None:
    """Raises MissingDependency."""
    devices.need(PACKAGES, "verl", ON_CPU)


def has_flash_attention(device: Device, warn: Callable[[str], None]) -> bool:
    """Whether the trainer can use flash-attn, which verl asks for on GPUs and nobody installs."""
    there = find_spec("flash_attn") is not None
    if device == "cuda" and not there:
        warn(
            "flash-attn is not installed: the trainer uses PyTorch's own attention, which is "
            "slower for long replies. To change that: pip install flash-attn --no-build-isolation"
        )
    return there


def choose_device(
    config: AstunerConfig, warn: Callable[[str], None], visible: int | None = None
) -> Device:
    """The device to train on. `visible` is the number of GPUs here; None counts them.

    Raises ConfigError when there are fewer than the configuration takes.
    """
    without = "the CPU is used, which is for trying out"
    return devices.choose_device(config, _gpus(config), warn, visible, without=without)


def _gpus(config: AstunerConfig) -> Gpus:
    trainer, rollout = config.trainer_common, config.rollout
    pools = " + rollout.n_gpus_per_node" if is_async(config) else ""
    return Gpus(
        machines=max(trainer.nnodes, rollout.nnodes if is_async(config) else 1),
        number=trainer.n_gpus_per_node + (rollout.n_gpus_per_node if is_async(config) else 0),
        machines_by="`astuner.trainer_common.nnodes`",
        by=f"`astuner.trainer_common.n_gpus_per_node`{pools}",
        hint="Set it lower, or check CUDA_VISIBLE_DEVICES.",
    )
