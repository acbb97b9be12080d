"""What a run with Trinity needs of this machine: the packages, and enough GPUs, or none."""

from __future__ import annotations

from collections.abc import Callable

from astuner.backbone.spawned import devices
from astuner.backbone.spawned.choices import Device
from astuner.backbone.spawned.devices import Gpus
from astuner.backbone.trinity.sections import Route, is_colocated, trainer_gpus
from astuner.config.schema import AstunerConfig

PACKAGES = ("trinity", "ray", "vllm", "greenlet")
"""vllm is imported by Trinity's modules even where another engine samples."""
FOR_A_SERVICE = ("tinker",)
HOW = (
    "The trinity backbone (on a machine without a GPU, `python scripts/install.py --env trinity` "
    "in a checkout makes an environment for it)"
)


def need_trinity(way: Route) -> None:
    """Raises MissingDependency."""
    devices.need((*PACKAGES, *(FOR_A_SERVICE if way == "service" else ())), "trinity", HOW)


def choose_device(
    config: AstunerConfig, warn: Callable[[str], None], visible: int | None = None
) -> Device:
    """The device that is trained on. `visible` is the number of GPUs here; None counts them.

    Raises ConfigError when there are fewer than the configuration takes.
    """
    if config.rollout.engine == "service":
        return "cpu"
    without = "astuner's own service samples and trains"
    return devices.choose_device(config, _gpus(config), warn, visible, without=without)


def _gpus(config: AstunerConfig) -> Gpus:
    own = config.rollout
    return Gpus(
        machines=max(config.trainer_common.nnodes, own.nnodes),
        number=trainer_gpus(config) + (0 if is_colocated(config) else own.n_gpus_per_node),
        machines_by="`astuner.trainer_common.nnodes` or `astuner.rollout.nnodes`",
        by="`astuner.trainer_common.n_gpus_per_node` + `astuner.rollout.n_gpus_per_node`",
        hint="Set them lower (on one GPU: rollout.mode=sync, trainer_common.n_gpus_per_node=1), "
        "check CUDA_VISIBLE_DEVICES, or use rollout.engine=service.",
    )
