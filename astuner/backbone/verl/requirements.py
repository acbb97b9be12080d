"""What a run with verl needs of this machine: the package, and enough GPUs, or none.

Asked before anything is started. A cluster that is joined by its address may have GPUs
that this machine has not, so there only the configuration counts.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from astuner.backbone.spawned.choices import Device, wanted_device
from astuner.backbone.verl.sections import is_async
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError, MissingDependency

PACKAGES = ("verl", "ray", "cloudpickle")
ON_CPU = (
    "The verl backbone (for machines with GPUs; to try it out without one, from a checkout: "
    "`python scripts/install.py --env verl -- astuner ...`)"
)


def need_verl() -> None:
    """Raises MissingDependency."""
    for package in PACKAGES:
        if find_spec(package) is None:
            raise MissingDependency(package, "verl", ON_CPU)


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
    wanted = wanted_device(config)
    if wanted == "cpu":
        return "cpu"
    if config.trainer_common.ray_address:
        return "cuda"
    visible = _gpus() if visible is None else visible
    if visible == 0 and wanted == "cuda":
        raise ConfigError(
            "`astuner.trainer_common.device` is cuda, but no GPU is visible here. Check "
            "nvidia-smi and CUDA_VISIBLE_DEVICES, or use device: cpu, which is for trying out."
        )
    if visible == 0:
        warn("No GPU is visible (`astuner.trainer_common.device` is auto): using the CPU.")
        return "cpu"
    _check_gpus(config, visible)
    return "cuda"


def _check_gpus(config: AstunerConfig, visible: int) -> None:
    trainer, rollout = config.trainer_common, config.rollout
    nodes = max(trainer.nnodes, rollout.nnodes if is_async(config) else 1)
    if nodes > 1:
        raise ConfigError(
            f"`astuner.trainer_common.nnodes` asks for {nodes} machines, which need a Ray "
            "cluster: `ray start --head` on one, `ray start --address=HEAD:6379` on the others, "
            "then start astuner on any of them with --ray-address auto."
        )
    needed = trainer.n_gpus_per_node + (rollout.n_gpus_per_node if is_async(config) else 0)
    if needed > visible:
        pools = " + rollout.n_gpus_per_node" if is_async(config) else ""
        raise ConfigError(
            f"`astuner.trainer_common.n_gpus_per_node`{pools} asks for {needed} GPUs, but "
            f"{visible} are visible here. Set it to {visible} or less, or check "
            "CUDA_VISIBLE_DEVICES."
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
