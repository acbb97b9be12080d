"""The proxy that records every call, in OpenAI's and Anthropic's dialects, and its clients.

`TunerServer` answers with an engine and a codec, `RelayServer` passes on to another
endpoint; both open a `Session` for each episode, whose `ModelTuner` the workflow
gets. Loaded on first use: naming them costs no server.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astuner.model_tuner.relay import RelayServer
    from astuner.model_tuner.server import ProxyServer, TunerServer
    from astuner.model_tuner.session import Problem, Session, SessionSampling, SessionSpec
    from astuner.model_tuner.tuner import AnthropicEndpoint, ModelTuner, OpenAIEndpoint
    from astuner.model_tuner.upstream import Upstream

_HOME = {
    "AnthropicEndpoint": "tuner",
    "ModelTuner": "tuner",
    "OpenAIEndpoint": "tuner",
    "Problem": "session",
    "ProxyServer": "server",
    "RelayServer": "relay",
    "Session": "session",
    "SessionSampling": "session",
    "SessionSpec": "session",
    "TunerServer": "server",
    "Upstream": "upstream",
}

__all__ = [
    "AnthropicEndpoint",
    "ModelTuner",
    "OpenAIEndpoint",
    "Problem",
    "ProxyServer",
    "RelayServer",
    "Session",
    "SessionSampling",
    "SessionSpec",
    "TunerServer",
    "Upstream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
