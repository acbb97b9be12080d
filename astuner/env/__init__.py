"""Environments: the clients that episodes act through, and the service that offers them.

Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astuner.env.actions import extract_action
    from astuner.env.opening import environment_service, open_environments
    from astuner.env.pool import EnvPool
    from astuner.env.session import GymEnv

_HOME = {
    "EnvPool": "pool",
    "GymEnv": "session",
    "environment_service": "opening",
    "extract_action": "actions",
    "open_environments": "opening",
}
__all__ = ["EnvPool", "GymEnv", "environment_service", "extract_action", "open_environments"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
