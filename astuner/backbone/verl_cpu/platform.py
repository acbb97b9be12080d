"""The CPU as one of verl's platforms (`verl.plugin.platform`), chosen by `set_platform`.

Ray's "GPU" stays the resource that verl's workers ask for, as a mere number. There is no
accelerator: memory figures are 0, and streams, IPC and profilers do nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import (  # pyright: ignore[reportMissingImports]
    PlatformBase,
    PlatformRegistry,
)


def _nothing(*_: Any, **__: Any) -> None:
    """What torch.cuda has and the CPU needs not."""


def _zero(*_: Any, **__: Any) -> int:
    return 0


def _no_memory(*_: Any) -> tuple[int, int]:
    return 0, 0


def _name(*_: Any) -> str:
    return "CPU"


def _cpu_module() -> ModuleType:
    """`torch.cpu`, and what verl calls of `torch.cuda` besides.

    `is_available` is False: verl takes it for "there is an accelerator" and skips memory
    snapshots (utils/memory_utils.py) without one. The random state is torch's own, for
    checkpoints (utils/checkpoint/checkpoint_manager.py:208 and 219).
    """
    module = ModuleType("torch.cpu")
    vars(module).update({n: v for n, v in vars(torch.cpu).items() if not n.startswith("_")})
    zeros = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    vars(module).update(dict.fromkeys(zeros, _zero))
    for name in (
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
        "reset_accumulated_memory_stats",
        "set_per_process_memory_fraction",
    ):
        setattr(module, name, _nothing)
    vars(module).update(
        is_available=lambda: False,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        mem_get_info=_no_memory,
        get_device_name=_name,
    )
    return module


@PlatformRegistry.register(platform="cpu")  # pyright: ignore[reportUntypedClassDecorator]
class PlatformCPU(PlatformBase):  # pyright: ignore[reportUntypedBaseClass]
    """One device, which is the machine."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _cpu_module()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never found by itself: only the plugin chooses it

    def current_device(self) -> Any:
        return torch.device("cpu")  # an index would be taken for one of cuda's

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...
    def synchronize(self, device_index: int | None = None) -> None: ...
    def set_allocator_settings(self, settings: str) -> None: ...
    def empty_cache(self) -> None: ...
    def profiler_start(self) -> None: ...
    def profiler_stop(self) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"  # what Ray sets for its "GPU"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None

    @contextmanager
    def nvtx_range(self, msg: str) -> Generator[None]:
        yield
