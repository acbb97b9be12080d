"""What verl 0.9.1 needs beyond its public doors to run, and run exactly, on CPUs.

Each patch names the line of verl it works around, and takes effect when verl's module is
imported, before anybody has taken names out of it; a process that never imports the
module pays nothing. Nothing is written to verl's files. The tests show for each what
happens without it, and fail once verl no longer needs it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Patch:
    """`replace` gets what `module.attribute` is and gives what it shall be."""

    module: str
    attribute: str
    line: str
    """Where verl, as of 0.9.1, does what cannot work."""
    why: str
    replace: Callable[[Any], Any]

    def apply(self, module: ModuleType) -> None:
        setattr(module, self.attribute, self.replace(getattr(module, self.attribute)))


def _gloo_once(original: Callable[..., None]) -> Callable[..., None]:
    def initialize_global_process_group_ray(
        timeout_second: float | None = None, backend: str | None = None
    ) -> None:
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    return initialize_global_process_group_ray


def _with_copies(original: Callable[..., Any]) -> Callable[..., Any]:
    def fsdp2_sharded_save_to_cpu(model: Any) -> tuple[dict[str, Any], Any]:
        state, spec = original(model)
        return {name: (tensor.clone(), own) for name, (tensor, own) in state.items()}, spec

    return fsdp2_sharded_save_to_cpu


def _no_offload(_: Any) -> Callable[..., Any]:
    def policy(pin_memory: bool = True) -> Any:
        from torch.distributed.fsdp import OffloadPolicy

        return OffloadPolicy()

    return policy


def _merged_unrounded(engine: Any) -> Any:
    def _merged_lora_per_tensor_param(self: Any) -> Generator[tuple[str, Any]]:
        module = sys.modules[engine.__module__]
        with module.merged_lora_context(self.module, backup_adapters=True):
            named = module.normalize_peft_param_name(self.module.state_dict())
            for name, value in module.convert_weight_keys(named, self.module).items():
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                yield name, whole.detach().clone()  # the merge is undone at the end

    engine._merged_lora_per_tensor_param = _merged_lora_per_tensor_param
    return engine


class _WithoutFlush(logging.LoggerAdapter[logging.Logger]):
    """Drops `print`'s keyword."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        kwargs.pop("flush", None)
        return msg, kwargs


PATCHES: Sequence[Patch] = (
    Patch(
        "verl.utils.distributed",
        "initialize_global_process_group_ray",
        "verl/utils/distributed.py:89",
        "the backend becomes 'cpu:gloo,cpu:gloo', and torch refuses a device type given twice",
        _gloo_once,
    ),
    Patch(
        "verl.utils.fsdp_utils",
        "fsdp2_sharded_save_to_cpu",
        "verl/utils/fsdp_utils.py:1167 and 1180",
        "Tensor.cpu() of a CPU tensor is the tensor itself: the snapshot of the old policy "
        "would go on training, silently",
        _with_copies,
    ),
    Patch(
        "verl.utils.fsdp_utils",
        "CPUOffloadPolicy",
        "verl/workers/engine/fsdp/transformer_impl.py:462",
        "the reference policy is offloaded to pinned memory, which needs an accelerator; "
        "on CPU there is nothing to offload",
        _no_offload,
    ),
    Patch(
        "verl.workers.engine.fsdp.transformer_impl",
        "FSDPEngine",
        "verl/workers/engine/fsdp/transformer_impl.py:1082",
        "base and LoRA reach the rollouts rounded to bfloat16 whatever both compute in, and a "
        "small step of the LoRA not at all; rollouts in float32 must sample from what is trained",
        _merged_unrounded,
    ),
    Patch(
        "verl.trainer.ppo.v1.trainer_separate_async",
        "logger",
        "verl/trainer/ppo/v1/trainer_separate_async.py:184",
        "a logger is called with flush=True where hybrid_engine is False; on any device, but "
        "only the CPU's plugin may patch",
        lambda logger: _WithoutFlush(logger, {}),
    ),
)


class _AfterImport(MetaPathFinder):
    """Imports the patched modules as ever, and then applies their patches."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self._patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patches = [p for p in self._patches if p.module == fullname]
        spec = PathFinder.find_spec(fullname, path, target) if patches else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Patching(spec.loader, patches)
        return spec


class _Patching(Loader):
    def __init__(self, loader: Loader, patches: Sequence[Patch]) -> None:
        self._loader = loader
        self._patches = patches

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for patch in self._patches:
            patch.apply(module)

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self._loader, name)


def apply(patches: Sequence[Patch] = PATCHES) -> None:
    """Now for modules that are imported already, else when they are."""
    later: list[Patch] = []
    for patch in patches:
        module = sys.modules.get(patch.module)
        if module is None:
            later.append(patch)
        else:
            patch.apply(module)
    sys.meta_path.insert(0, _AfterImport(later))
