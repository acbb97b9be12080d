"""Chat completions answered by somebody else's endpoint, and which targets' calls are.

The same sessions, keys, refusals and limits as for the model that is tuned. Calls are
recorded as text; they carry token ids only where the endpoint returns them (vLLM with
`return_token_ids`), so nothing here can be trained in earnest.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from pydantic_core import from_json, to_json

from astuner.errors import EngineError, RequestError
from astuner.model_tuner import sampling
from astuner.model_tuner.exchange import Endpoint, Exchange
from astuner.model_tuner.relayed_reply import RelayedReplies
from astuner.model_tuner.serving import model_deadline
from astuner.model_tuner.session import AgentKey, SessionBook
from astuner.model_tuner.tool_choice import ToolUse, tool_use
from astuner.model_tuner.upstream import Upstream
from astuner.model_tuner.wire import ChatRequest, parse_request


class NoCompletions(Endpoint):
    """Raw prompts are not passed on: most endpoints have stopped to take them."""

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        raise RequestError(
            "An endpoint is asked for /v1/chat/completions only. /v1/completions needs a model "
            "of the run's own: for this target (model.targets), or with debug.model=embedded.",
            status=404,
            code="not_found",
        )


class RelayChat(Endpoint):
    """POST /v1/chat/completions, answered elsewhere."""

    def __init__(
        self,
        upstream: Upstream,
        sessions: SessionBook,
        call_timeout: float,
        ask_token_ids: bool = False,
        as_asked: bool = False,
    ) -> None:
        """`as_asked` leaves sampling and length to the client, for a model that is not the one
        being tuned."""
        super().__init__(sessions)
        self._upstream = upstream
        self._call_timeout = call_timeout
        self._ask_token_ids = ask_token_ids
        self._as_asked = as_asked

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        data = await exchange.json()
        request = parse_request(ChatRequest, data)
        with agent.attempts.take(exchange.claim) as attempt:
            if attempt.answered is not None:
                agent.session.count("answered_again")
                rest = from_json(attempt.answered)
            else:
                async with exchange.flight(agent), model_deadline(self._call_timeout):
                    told, rest = await self._ask(agent, request, data, exchange)
                    attempt.answered = to_json(told)
        if not request.stream:
            await exchange.reply(rest[0])
            return
        for event in rest:
            await exchange.events.send(event)
        await exchange.events.done()

    async def _ask(
        self, agent: AgentKey, request: ChatRequest, data: dict[str, Any], exchange: Exchange
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Ask and record: the answer, and what of it the client does not have yet."""
        use = tool_use(request)
        body = self._body(agent, request, data)
        replies = RelayedReplies(agent, data, request.n)
        if request.stream:
            told, passed_on = await self._pass_on(body, replies, exchange)
        else:
            told, passed_on = [await self._upstream.ask(body)], 0
            replies.whole(told[0])
        self._record(agent, replies, use)
        return told, told[passed_on:]

    async def _pass_on(
        self, body: Mapping[str, Any], replies: RelayedReplies, exchange: Exchange
    ) -> tuple[list[dict[str, Any]], int]:
        """Pass chunks on as they come, but keep the last ones until the calls are recorded: all
        of them, and how many were passed on."""
        told: list[dict[str, Any]] = []
        passed_on, ends = 0, False
        async with aclosing(self._upstream.stream(body)) as events:
            async for event in events:
                told.append(event)
                ends = replies.chunk(event) or ends
                if not ends:
                    passed_on += 1
                    await exchange.events.send(event)
        return told, passed_on

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
        if self._as_asked:
            spec = replace(spec, sampling=replace(spec.sampling, override=False))
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
        limit = spec.sampling.max_tokens
        body[name] = (asked or limit) if self._as_asked else min(asked or limit, limit)
        return body


class ByTarget(Endpoint):
    """Passes the calls of some targets to endpoints of their own."""

    def __init__(
        self, rest: Endpoint, targets: Mapping[str, Endpoint], sessions: SessionBook
    ) -> None:
        super().__init__(sessions)
        self._rest = rest
        self._targets = targets

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        await self._targets.get(agent.target_tag, self._rest).answer(agent, exchange)


def relays(
    upstreams: Mapping[str, Upstream], sessions: SessionBook, call_timeout: float
) -> dict[str, Endpoint]:
    """Target tag -> an endpoint that passes its calls on, as the client asks them."""
    return {
        tag: RelayChat(upstream, sessions, call_timeout, as_asked=True)
        for tag, upstream in upstreams.items()
    }
