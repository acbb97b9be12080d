"""A service's samplers as an Engine: tokens in, tokens out.

The API answers in one piece, so a stream has one chunk. Which sampler is asked is decided
when a stream begins; its weights never change. Knows nothing of training.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from astuner.backbone.tinker.connection import Connection
from astuner.engine.protocol import SamplingParams, TokenChunk
from astuner.errors import ContextLengthError, EngineError


@dataclass(frozen=True)
class EngineStats:
    sampled_tokens: int


class TinkerEngine:
    """An `Engine`; usable from any thread and loop."""

    def __init__(self, connection: Connection, *, max_context: int, call_timeout: float) -> None:
        self.max_context = max_context
        self._connection = connection
        self._call_timeout = call_timeout
        self._sampler: tuple[Any, int] | None = None
        self._sampled = 0
        self._lock = threading.Lock()

    @property
    def version(self) -> int:
        """Of the weights that sample."""
        return 0 if self._sampler is None else self._sampler[1]

    def use(self, sampler: Any, version: int) -> None:
        """From now on streams begin with this sampler."""
        self._sampler = sampler, version

    def stats(self) -> EngineStats:
        return EngineStats(self._sampled)

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenChunk, None]:
        """See `Engine.stream`."""
        room = self.max_context - len(prompt_ids)
        if room < 1:
            raise ContextLengthError(len(prompt_ids), self.max_context)
        if self._sampler is None:
            raise EngineError("Nothing samples yet: publish weights first.")
        sampler, version = self._sampler
        answer = await self._connection.ask(
            "A sample",
            lambda: self._sample(sampler, [int(i) for i in prompt_ids], params, room),
            deadline=self._call_timeout,
            blocks=False,
        )
        chunk = _chunk(answer, params, version)
        with self._lock:
            self._sampled += len(chunk.token_ids)
        yield chunk

    def _sample(self, sampler: Any, prompt: list[int], params: SamplingParams, room: int) -> Any:
        types = self._connection.sdk.types
        wire = types.SamplingParams(
            max_tokens=min(params.max_tokens, room),
            seed=params.seed,
            stop=list(params.stop_token_ids),
            temperature=params.temperature,
            top_k=params.top_k or -1,
            top_p=params.top_p,
        )
        more = {"topk_sample_logprobs": params.top_logprobs} if params.top_logprobs else {}
        try:
            return sampler.sample(types.ModelInput.from_ints(prompt), 1, wire, **more)
        except TypeError as error:
            raise EngineError(
                "top_logprobs of sampled tokens need a newer SDK: pip install -U tinker."
            ) from error


def _chunk(answer: Any, params: SamplingParams, version: int) -> TokenChunk:
    sequence = answer.sequences[0]
    ids = tuple(int(i) for i in sequence.tokens)
    logprobs = sequence.logprobs
    if logprobs is None or len(logprobs) != len(ids):
        raise EngineError(
            f"The service gave {len(ids)} tokens with "
            f"{'no' if logprobs is None else len(logprobs)} logprobs; training needs one for each."
        )
    return TokenChunk(
        ids,
        tuple(float(value) for value in logprobs),
        version,
        "stop" if sequence.stop_reason == "stop" else "length",
        _alternatives(sequence) if params.top_logprobs else (),
        int(getattr(answer, "prompt_cache_hit_tokens", 0) or 0),
    )


def _alternatives(sequence: Any) -> tuple[Mapping[int, float], ...]:
    return tuple(dict(row or ()) for row in sequence.topk_logprobs or ())
