"""With what words Ray is started, or an existing cluster joined.

A cluster of our own is for one run on this machine: on the loopback address, without
dashboard and usage reports, with an object store that small machines can afford, its
files in the run's temporary folder. Of a given cluster nothing is set but its address.
Pure; Ray is not imported.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from astuner.backbone import verl_cpu
from astuner.backbone.verl.files import FOLDER_VARIABLE, METRICS
from astuner.errors import ConfigError

PLUGINS = ("astuner.backbone.verl.plugin", "astuner.backbone.verl.stacks")
PLUGINS_VARIABLE = "VERL_USE_EXTERNAL_MODULES"
STORE_SHARE = 0.1
"""Of the machine's memory."""
STORE_LEAST, STORE_MOST = 200 << 20, 32 << 30
SHARED_MEMORY = Path("/dev/shm")
TOKEN_FILE = Path("~/.ray/auth_token")
CPUS_LEAST = 16
"""Ray only counts them, and verl's processes ask for some each."""


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
    arguments: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": object_store_bytes(),
        "_temp_dir": temporary,
        "_node_ip_address": "127.0.0.1",
        "num_cpus": max(os.cpu_count() or 1, CPUS_LEAST),
    }
    if device == "cpu":
        arguments |= verl_cpu.logical_resources(trainer, nodes * gpus if own_pool else 0)
    return arguments


def object_store_bytes() -> int:
    """Not more than what is free where it lies, or Ray would put it on the disk."""
    wanted = min(max(int(psutil.virtual_memory().total * STORE_SHARE), STORE_LEAST), STORE_MOST)
    if SHARED_MEMORY.is_dir():
        free = psutil.disk_usage(str(SHARED_MEMORY)).free
        wanted = min(wanted, int(free * 0.9))
    return max(wanted, 100 << 20)


def check_address(address: str) -> None:
    """Raises ConfigError for an address that verl's driver cannot join by."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"`astuner.trainer_common.ray_address` is {address!r}, a Ray client's address. Start "
            'astuner on a machine of the cluster, and give "auto" or the head\'s HOST:6379.'
        )


def authentication(address: str) -> dict[str, str]:
    """Of the driver alone; what it starts inherits it, and no log shows it.

    Ray by itself writes a token for a new cluster into the user's home, after which `ray
    start` wants it of everyone, but `ray.init` with an address does not look for it.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return {}
    if not address:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN_FILE.expanduser()
    has_token = "RAY_AUTH_TOKEN" in os.environ or Path(path).exists()
    return {"RAY_AUTH_MODE": "token"} if has_token else {}


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
