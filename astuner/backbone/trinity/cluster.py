"""What Trinity's processes have in their environment. Pure; Ray is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from astuner.backbone.spawned.files import FOLDER_VARIABLE

OURS = (
    FOLDER_VARIABLE,
    "PYTHONUNBUFFERED",
    "RAY_USAGE_STATS_ENABLED",
    "RAY_DEDUP_LOGS",
    "VLLM_PLUGINS",
    "TINKER_BASE_URL",
    "TOKENIZERS_PARALLELISM",
)
SECRET = ("TINKER_API_KEY",)
"""Inherited where the cluster is our own; told to Ray, whose logs may show it, only where it
has to be."""


def driver_environment(folder: Path, service: tuple[str, str] | None) -> dict[str, str]:
    """Of the driver, which all that it starts inherits. `service` is its URL and key."""
    variables = {
        FOLDER_VARIABLE: str(folder),
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_register_timeout_seconds": "300",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Trinity's entry point for vLLM crashes any vLLM from 0.26 on (facts: vllm_patch)
        "VLLM_PLUGINS": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if service is not None:
        variables["TINKER_BASE_URL"], variables["TINKER_API_KEY"] = service
    return variables


def process_environment(environment: Mapping[str, str], *, shared: bool) -> dict[str, str]:
    """Of Ray's runtime environment. `shared`: the cluster is not our own."""
    names = (*OURS, *SECRET) if shared else OURS
    return {name: environment[name] for name in names if name in environment}
