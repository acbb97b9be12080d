"""The proxy in front of somebody else's model, for debugging workflows without an engine.

Chat completions are passed on to any OpenAI-compatible endpoint, with the same
sessions, keys, refusals and limits as in training. Calls are recorded as text;
they carry token ids only where the endpoint returns them (vLLM with
`return_token_ids`), so nothing here can be trained in earnest.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from astuner.errors import EngineError, RequestError
from astuner.model_tuner import sampling
from astuner.model_tuner.app import build_app
from astuner.model_tuner.exchange import Endpoint, Exchange
from astuner.model_tuner.relayed_reply import RelayedReplies
from astuner.model_tuner.server import ProxyServer
from astuner.model_tuner.serving import model_deadline
from astuner.model_tuner.session import AgentKey, SessionBook
from astuner.model_tuner.tool_choice import ToolUse, tool_use
from astuner.model_tuner.upstream import Upstream
from astuner.model_tuner.wire import ChatRequest, parse_request


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
    ) -> None:
        """`ask_token_ids` sends `return_token_ids`, which vLLM knows and OpenAI refuses;
        `max_context` is only told to clients that want to know."""
        sessions = SessionBook()
        upstream = Upstream(base_url, model, api_key)
        chat = RelayChat(upstream, sessions, call_timeout, ask_token_ids)
        super().__init__(
            build_app(chat, NoCompletions(sessions), sessions, model),
            sessions,
            model_name=model,
            host=host,
            port=port,
            call_timeout=call_timeout,
            max_context=max_context,
        )


class NoCompletions(Endpoint):
    """Raw prompts are not passed on: most endpoints have stopped to take them."""

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        raise RequestError(
            "The debug relay passes on /v1/chat/completions only. Use the embedded model "
            "(debug.model=embedded) for /v1/completions.",
            status=404,
            code="not_found",
        )


class RelayChat(Endpoint):
    """POST /v1/chat/completions, answered elsewhere."""

    def __init__(
        self, upstream: Upstream, sessions: SessionBook, call_timeout: float, ask_token_ids: bool
    ) -> None:
        super().__init__(sessions)
        self._upstream = upstream
        self._call_timeout = call_timeout
        self._ask_token_ids = ask_token_ids

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        data = await exchange.json()
        request = parse_request(ChatRequest, data)
        use = tool_use(request)
        body = self._body(agent, request, data)
        replies = RelayedReplies(agent, data, request.n)
        response: dict[str, Any] = {}
        last: list[dict[str, Any]] = []
        async with exchange.flight(agent), model_deadline(self._call_timeout):
            if request.stream:
                last = await self._pass_on(body, replies, exchange)
            else:
                response = await self._upstream.ask(body)
                replies.whole(response)
            self._record(agent, replies, use)
        if not request.stream:
            await exchange.reply(response)
            return
        for event in last:
            await exchange.events.send(event)
        await exchange.events.done()

    async def _pass_on(
        self, body: Mapping[str, Any], replies: RelayedReplies, exchange: Exchange
    ) -> list[dict[str, Any]]:
        """Pass chunks on as they come, but keep the last ones until the calls are recorded."""
        kept: list[dict[str, Any]] = []
        async with aclosing(self._upstream.stream(body)) as events:
            async for event in events:
                if replies.chunk(event) or kept:
                    kept.append(event)
                else:
                    await exchange.events.send(event)
        return kept

    def _record(self, agent: AgentKey, replies: RelayedReplies, use: ToolUse) -> None:
        if not replies.complete:
            raise EngineError("The endpoint ended its answer before every choice was finished.")
        calls = replies.calls()
        agent.session.record(agent, calls)
        for _, call in calls:
            if not use.met_by(call.response.get("tool_calls", ())):
                agent.session.count("tool_choice_unmet")

    def _body(
        self, agent: AgentKey, request: ChatRequest, data: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The request as the endpoint gets it: its own model, the session's sampling."""
        spec = agent.session.spec
        draw = sampling.resolve(request, spec)
        if draw.overridden:
            agent.session.count("overridden_sampling")
        ours = ("temperature", "top_p", "top_k", "seed", "return_token_ids")
        body = {name: value for name, value in data.items() if name not in ours}
        body["model"] = self._upstream.model
        # Some models refuse to be told what is the default anyway.
        body |= {"temperature": draw.temperature} if draw.temperature != 1.0 else {}
        body |= {"top_p": draw.top_p} if draw.top_p != 1.0 else {}
        body |= {"top_k": draw.top_k} if draw.top_k else {}
        body |= {"seed": draw.seed} if draw.seed is not None else {}
        body |= {"return_token_ids": True, "logprobs": True} if self._ask_token_ids else {}
        if request.continuous_usage and not self._ask_token_ids:  # vLLM's, which others refuse
            body["stream_options"] = {"include_usage": True}
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        asked = request.max_completion_tokens or request.max_tokens
        body[name] = min(asked or spec.sampling.max_tokens, spec.sampling.max_tokens)
        return body
