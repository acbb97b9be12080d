"""verl's rollout servers as an Engine: tokens in, tokens out.

One `stream` is one `LLMServerClient.generate`, which answers in one piece, so there is
one chunk (two, where the weights changed meanwhile). It is awaited on the loop of verl's
AgentLoopWorker. A caller who leaves cancels that await; verl has no way to stop the
server, which samples on to the call's length limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol
from uuid import uuid4

from astuner.backbone.spawned.answers import Answer, AnswerEngine
from astuner.engine.protocol import SamplingParams
from astuner.errors import EngineError

ABORTED = ("abort", "aborted")


class Output(Protocol):
    """What is read of verl's TokenOutput."""

    token_ids: list[int]
    log_probs: list[float] | None
    stop_reason: str | None
    extra_fields: dict[str, Any]


class Client(Protocol):
    """verl's LLMServerClient."""

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]
    ) -> Output: ...


class VerlEngine(AnswerEngine):
    """An `Engine` over verl's client; usable from any thread and loop."""

    def __init__(
        self,
        client: Client,
        loop: asyncio.AbstractEventLoop,
        *,
        max_context: int,
        seeded: bool = False,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """`seeded`: the server takes a `seed` for each call. vLLM does, but slows down with
        it, and would repeat its random numbers where it goes on after a weight update."""
        super().__init__(loop, max_context=max_context, on_answer=on_answer)
        self._client = client
        self._seeded = seeded

    async def sample(self, prompt_ids: list[int], params: SamplingParams, limit: int) -> Answer:
        # verl sends calls of one request id to one server, for its prefix cache.
        request_id = params.session or uuid4().hex
        output = await self._client.generate(
            request_id, prompt_ids=prompt_ids, sampling_params=self._wire(params, limit)
        )
        oldest, newest = check(output, limit)
        cached = output.extra_fields.get("num_cached_tokens") or 0
        return Answer(output.token_ids, output.log_probs or (), oldest, newest, cached)

    def _wire(self, params: SamplingParams, limit: int) -> dict[str, Any]:
        """The parameters under verl's names, which are vLLM's."""
        wire: dict[str, Any] = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "repetition_penalty": 1.0,
            "max_tokens": limit,
            "logprobs": True,
        }
        if params.stop_token_ids:
            wire["stop_token_ids"] = list(params.stop_token_ids)
        if self._seeded and params.seed is not None:
            wire["seed"] = params.seed
        return wire


def check(output: Output, limit: int) -> tuple[int, int]:
    """The oldest and newest weights that sampled it. Raises EngineError for what cannot be
    trained on: a call broken off, no tokens, no logprobs or no weight version."""
    fields, count = output.extra_fields, len(output.token_ids)
    if output.stop_reason in ABORTED:
        raise EngineError("verl's rollout server broke the call off, for a weight update.")
    if not 0 < count <= limit:
        raise EngineError(f"verl's rollout server answered {count} tokens; 1 to {limit} were due.")
    if len(output.log_probs or ()) != count:
        raise EngineError(
            f"verl's rollout server answered {count} tokens with {len(output.log_probs or ())} "
            "logprobs. Leave actor_rollout_ref.rollout.calculate_log_probs at true."
        )
    newest = fields.get("max_global_steps", fields.get("global_steps"))
    if newest is None:
        raise EngineError("verl's rollout server did not say which weights it sampled with.")
    oldest = fields.get("min_global_steps")
    return int(newest if oldest is None else oldest), int(newest)
