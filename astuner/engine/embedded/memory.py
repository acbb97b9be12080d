"""How many tokens of KV this machine can hold, when nobody said.

Two budgets: the pool of running sequences and the prefix cache. Both are upper
bounds; memory is taken as sequences come. Nothing is allocated here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from astuner.engine.embedded.kv_cache import BLOCK, KVLayout

POOL_SHARE = 0.3
"""Of the memory that is free once the weights are loaded; training needs the rest."""
CACHE_SHARE = 0.15
ADAPTER_SHARE = 0.2
"""Of a GPU's free memory, for the adapters of a host; the others wait in host memory."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class KVBudgets:
    """In tokens."""

    pool: int
    cache: int


def kv_budgets(
    layout: KVLayout, *, max_num_seqs: int, max_context: int, kv_cache_tokens: int
) -> KVBudgets:
    """`kv_cache_tokens` is the prefix cache's budget where above 0. Neither is more than
    could ever be used: a slot is at most a quarter, or a block, longer than its sequence."""
    tokens = free_memory(layout.device) // layout.bytes_per_token
    most = max_num_seqs * (max_context + max(max_context // 4, BLOCK))
    cache = kv_cache_tokens or min(int(tokens * CACHE_SHARE), most)
    return KVBudgets(min(int(tokens * POOL_SHARE), most), cache)


def adapter_budget(device: torch.device) -> int:
    """Bytes of adapters, optimizers and snapshots that may stay on the device."""
    if device.type == "cpu":
        return sys.maxsize  # there is nowhere else to put them
    return int(free_memory(device) * ADAPTER_SHARE)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, else of the machine and its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available
    return min(available, max(limit - used, 0))
