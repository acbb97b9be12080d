"""What a run with Trinity needs of this machine: the packages, and enough GPUs, or none.

Asked before anything is started. A cluster that is joined by its address may have GPUs
that this machine has not, so there only the configuration counts.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from astuner.backbone.spawned.choices import Device, wanted_device
from astuner.backbone.trinity.sections import Route, is_colocated, trainer_gpus
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError, MissingDependency

PACKAGES = ("trinity", "ray", "vllm", "greenlet")
"""vllm is imported by Trinity's modules even where another engine samples."""
FOR_A_SERVICE = ("tinker",)
HOW = (
    "The trinity backbone (on a machine without a GPU, `python scripts/install.py --env trinity` "
    "in a checkout makes an environment for it)"
)


def need_trinity(way: Route) -> None:
    """Raises MissingDependency."""
    for package in (*PACKAGES, *(FOR_A_SERVICE if way == "service" else ())):
        if find_spec(package) is None:
            raise MissingDependency(package, "trinity", HOW)


def choose_device(
    config: AstunerConfig, warn: Callable[[str], None], visible: int | None = None
) -> Device:
    """The device that is trained on. `visible` is the number of GPUs here; None counts them.

    Raises ConfigError when there are fewer than the configuration takes.
    """
    wanted = wanted_device(config)
    if wanted == "cpu" or config.rollout.engine == "service":
        return "cpu"
    if config.trainer_common.ray_address:
        return "cuda"
    visible = _gpus() if visible is None else visible
    if visible == 0 and wanted == "cuda":
        raise ConfigError(
            "`astuner.trainer_common.device` is cuda, but no GPU is visible here. Check "
            "nvidia-smi and CUDA_VISIBLE_DEVICES, or use device: cpu: then astuner's own "
            "service samples and trains."
        )
    if visible == 0:
        warn(
            "No GPU is visible (`astuner.trainer_common.device` is auto): astuner's own service "
            "samples and trains."
        )
        return "cpu"
    _check_gpus(config, visible)
    return "cuda"


def _check_gpus(config: AstunerConfig, visible: int) -> None:
    own = config.rollout
    if max(config.trainer_common.nnodes, own.nnodes) > 1:
        raise ConfigError(
            "`astuner.trainer_common.nnodes` and `astuner.rollout.nnodes` ask for several "
            "machines, which need a Ray cluster: `ray start --head` on one, `ray start "
            "--address=HEAD:6379` on the others, then start astuner on any of them with "
            "--ray-address auto."
        )
    needed = trainer_gpus(config) + (0 if is_colocated(config) else own.n_gpus_per_node)
    if needed > visible:
        raise ConfigError(
            f"`astuner.trainer_common.n_gpus_per_node` and `astuner.rollout.n_gpus_per_node` "
            f"ask for {needed} GPUs together, but {visible} are visible here. Set them lower "
            "(on one GPU: rollout.mode=sync, trainer_common.n_gpus_per_node=1), check "
            "CUDA_VISIBLE_DEVICES, or use rollout.engine=service."
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
