"""One choice of an answer, from the engine's first token to the recorded Call.

A `Reply` collects exactly what was sampled: ids, logprobs, weight versions. The
engine is one of the house's named boundaries: whatever it raises that is no
AstunerError becomes an EngineError here. What the tokens mean is the endpoint's.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from astuner.engine.protocol import Engine, SamplingParams, TokenChunk
from astuner.errors import AstunerError, EngineError
from astuner.model_tuner.session import AgentKey, call_seed, prompt_digest
from astuner.model_tuner.stops import StopStrings
from astuner.types import Call, FinishReason, TokenIds, token_ids

Growth = Callable[["Reply"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Turn:
    """What the choices of one request share."""

    agent: AgentKey
    request: Mapping[str, Any]
    prompt_ids: TokenIds
    params: SamplingParams
    stops: StopStrings
    client_seed: int | None = None
    parent_id: str | None = None
    new_timeline_reason: str | None = None


class Reply:
    """One choice as it grows."""

    def __init__(self, turn: Turn, index: int) -> None:
        session = turn.agent.session
        self.turn = turn
        self.index = index
        self.number = session.number()
        self.call_id = f"{session.spec.episode_id}:{self.number}"
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.top: list[Mapping[int, float]] = []
        self.finish: FinishReason = "cancelled"
        self.cached = 0
        self.started_at = time.time()

    @property
    def token_ids(self) -> TokenIds:
        return token_ids(self.ids)

    async def sample(self, engine: Engine, on_growth: Growth | None = None) -> None:
        """Draw the tokens; `on_growth` is awaited after each chunk. Raises EngineError."""
        turn, session = self.turn, self.turn.agent.session
        prompt = prompt_digest(turn.prompt_ids)
        occurrence = session.occurrence(prompt)
        seed = self._seed(prompt, occurrence)
        whole = on_growth is None and not turn.stops
        params = replace(turn.params, seed=seed, session=session.spec.episode_id, whole=whole)
        finished = False
        try:
            await self._collect(engine, params, on_growth)
            finished = True
        finally:
            if not finished:
                session.release(prompt, occurrence)

    def _seed(self, prompt: bytes, occurrence: int) -> int | None:
        spec = self.turn.agent.session.spec
        if self.turn.client_seed is not None:
            return (self.turn.client_seed + self.index) % 2**63
        return call_seed(spec.seed, prompt, occurrence) if spec.record else None

    async def _collect(
        self, engine: Engine, params: SamplingParams, on_growth: Growth | None
    ) -> None:
        async with aclosing(_chunks(engine, self.turn.prompt_ids.tolist(), params)) as chunks:
            async for chunk in chunks:
                self._take(chunk)
                if on_growth is not None:
                    await on_growth(self)
                if self.finish != "cancelled":
                    return
        raise EngineError("The engine ended its stream before the reply was finished.")

    def _take(self, chunk: TokenChunk) -> None:
        count = len(chunk.token_ids)
        if self.turn.stops:
            count = self._until_stop(chunk.token_ids)
        else:
            self.ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs[:count])
        self.versions.extend([chunk.weight_version] * count)
        self.top.extend(chunk.top_logprobs[:count])
        self.cached = self.cached or chunk.prefill_cached
        if self.finish == "cancelled" and chunk.finish_reason is not None:
            self.finish = chunk.finish_reason

    def _until_stop(self, ids: Sequence[int]) -> int:
        """Take tokens up to the one that completes a stop string, whatever the chunking."""
        for taken, token in enumerate(ids, start=1):
            self.ids.append(token)
            if self.turn.stops.reached(self.ids):
                self.finish = "stop"
                return taken
        return len(ids)

    def call(self, response: Mapping[str, Any]) -> Call:
        """The record of this reply, answered with `response`."""
        turn, agent = self.turn, self.turn.agent
        return Call(
            call_id=self.call_id,
            episode_id=agent.session.spec.episode_id,
            agent_name=agent.agent_name,
            target_tag=agent.target_tag,
            prompt_ids=turn.prompt_ids,
            completion_ids=self.token_ids,
            logprobs=np.asarray(self.logprobs, np.float32),
            weight_versions=np.asarray(self.versions, np.int32),
            finish_reason=self.finish,
            request=turn.request,
            response=response,
            started_at=self.started_at,
            ended_at=time.time(),
            parent_id=turn.parent_id,
            new_timeline_reason=turn.new_timeline_reason,
            prefill_cached=self.cached,
        )


async def _chunks(
    engine: Engine, prompt: Sequence[int], params: SamplingParams
) -> AsyncGenerator[TokenChunk, None]:
    """The engine's stream, closed when we are, with EngineErrors only."""
    stream = engine.stream(prompt, params)
    try:
        async for chunk in stream:
            yield chunk
    except AstunerError:
        raise
    except Exception as error:
        raise EngineError(f"The engine failed: {type(error).__name__}: {error}") from error
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()


def usage(replies: Sequence[Reply], prompts: Sequence[TokenIds]) -> dict[str, Any]:
    """OpenAI's usage object; each prompt counts once, however many choices it has."""
    prompt_tokens = sum(len(p) for p in prompts)
    completion_tokens = sum(len(r.ids) for r in replies)
    cached = max((r.cached for r in replies), default=0)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
