"""A Ray cluster of our own, and the words by which a given one is joined.

Our own is for one run on this machine: on the loopback address, without dashboard and
usage reports, with an object store that small machines can afford, its files in the run's
temporary folder. Pure; Ray is not imported.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import psutil

from astuner.errors import ConfigError

STORE_SHARE = 0.1
"""Of the machine's memory."""
STORE_LEAST, STORE_MOST = 200 << 20, 32 << 30
SHARED_MEMORY = Path("/dev/shm")
TOKEN_FILE = Path("~/.ray/auth_token")
CPUS_LEAST = 16
"""Ray only counts them, and a trainer's processes ask for some each."""


def own_cluster(temporary: str) -> dict[str, Any]:
    """Keywords of `ray.init`."""
    return {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": object_store_bytes(),
        "_temp_dir": temporary,
        "_node_ip_address": "127.0.0.1",
        "num_cpus": max(os.cpu_count() or 1, CPUS_LEAST),
    }


def object_store_bytes() -> int:
    """Not more than what is free where it lies, or Ray would put it on the disk."""
    wanted = min(max(int(psutil.virtual_memory().total * STORE_SHARE), STORE_LEAST), STORE_MOST)
    if SHARED_MEMORY.is_dir():
        free = psutil.disk_usage(str(SHARED_MEMORY)).free
        wanted = min(wanted, int(free * 0.9))
    return max(wanted, 100 << 20)


def check_address(address: str) -> None:
    """Raises ConfigError for an address that a driver cannot join by."""
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
