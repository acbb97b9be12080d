"""With what words verl starts Ray, or joins an existing cluster, and its processes' environment.

Of a given cluster nothing is set but its address. Pure; Ray is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astuner.backbone import verl_cpu
from astuner.backbone.spawned.files import FOLDER_VARIABLE, METRICS
from astuner.backbone.spawned.ray_cluster import CPUS_LEAST, own_cluster

PLUGINS = ("astuner.backbone.verl.plugin", "astuner.backbone.spawned.stacks")
PLUGINS_VARIABLE = "VERL_USE_EXTERNAL_MODULES"
CPUS_A_GPU = 3
"""What verl asks Ray for (single_controller/ray/base.py:192). It waits without a limit where
there are fewer, and says nothing."""


def init_arguments(
    verl: Mapping[str, Any], address: str, device: str, temporary: str
) -> dict[str, Any]:
    """Keywords of `ray.init`. `verl` has the flat settings of the resource pools."""
    if address:
        return {"address": address}
    trainer = int(verl["trainer.nnodes"]) * int(verl["trainer.n_gpus_per_node"])
    own_pool = verl.get("trainer.v1.trainer_mode") == "separate_async"
    rollout = "actor_rollout_ref.rollout"
    nodes, gpus = (int(verl.get(f"{rollout}.{k}") or 0) for k in ("nnodes", "n_gpus_per_node"))
    arguments = own_cluster(temporary)
    pool = nodes * gpus if own_pool else 0
    if device == "cpu":
        return arguments | verl_cpu.logical_resources(trainer, pool)
    asked = CPUS_LEAST + CPUS_A_GPU * (trainer + pool)
    return arguments | {"num_cpus": max(arguments["num_cpus"], asked)}


def environment(folder: Path, device: str) -> dict[str, str]:
    """What every process of verl must have in its environment."""
    ours = [*PLUGINS, verl_cpu.PLUGIN] if device == "cpu" else [*PLUGINS]
    others = [m for m in os.environ.get(PLUGINS_VARIABLE, "").split(",") if m and m not in ours]
    return {
        FOLDER_VARIABLE: str(folder),
        PLUGINS_VARIABLE: ",".join([*ours, *others]),
        "VERL_FILE_LOGGER_PATH": str(folder / METRICS),
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_register_timeout_seconds": "300",
        **(verl_cpu.environment() if device == "cpu" else {}),
    }
