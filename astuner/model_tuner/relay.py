"""The proxy in front of somebody else's model, for debugging workflows without an engine.

Chat completions are passed on to any OpenAI-compatible endpoint, or for single targets to
others. How, is `relayed_chat`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping

from astuner.model_tuner.app import build_app
from astuner.model_tuner.relayed_chat import ByTarget, NoCompletions, RelayChat, relays
from astuner.model_tuner.server import ProxyServer
from astuner.model_tuner.session import SessionBook
from astuner.model_tuner.upstream import Upstream


class RelayServer(ProxyServer):
    """The proxy in front of `base_url`, e.g. "https://api.openai.com/v1"."""

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        call_timeout: float = 300.0,
        max_context: int = 128_000,
        ask_token_ids: bool = False,
        others: Mapping[str, Upstream] | None = None,
    ) -> None:
        """`ask_token_ids` sends `return_token_ids`, which vLLM knows and OpenAI refuses;
        `max_context` is only told to clients that want to know. `others` answer single
        target tags."""
        sessions = SessionBook()
        upstream = Upstream(base_url, model, api_key)
        chat = RelayChat(upstream, sessions, call_timeout, ask_token_ids)
        answering = ByTarget(chat, relays(others or {}, sessions, call_timeout), sessions)
        super().__init__(
            build_app(answering, NoCompletions(sessions), sessions, model),
            sessions,
            model_name=model,
            host=host,
            port=port,
            call_timeout=call_timeout,
            max_context=max_context,
        )
