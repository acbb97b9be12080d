"""One rollout server: verl's requests answered by an embedded model that follows the trainer.

Tokens in, tokens out, with the logprobs of the distribution really drawn from. It can
be paused, whereupon replies under way end as "aborted" with what they have and later
requests wait (or are turned away); new weights are taken as a whole. No Ray and no
verl here: `rollout` puts it into an actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.protocol import SamplingParams
from astuner.errors import ContextLengthError, DeadlineExceeded, EngineError

StopReason = Literal["stop", "length", "aborted"]
PAUSE_SECONDS = 60.0
"""So long may replies under way take to end; a tick of the model is far shorter."""
NEUTRAL: Mapping[str, Collection[Any]] = {
    "n": (1, None),
    "min_p": (0, None),
    "min_tokens": (0, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "repetition_penalty": (1, None),
    "stop": ((), [], None),
    "logprobs": (True, False, 0, None),
}
"""Parameters of verl's engines that this one does not know, and values that mean nothing."""


@dataclass(frozen=True)
class Limits:
    """In tokens, as verl's rollout configuration has them."""

    prompt_length: int
    response_length: int
    end_tokens: frozenset[int] = frozenset()
    """A reply ends after one of these, unless the request says `ignore_eos`."""


@dataclass
class Reply:
    """`version` is that of the weights that drew all of its tokens."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    stop_reason: StopReason = "aborted"
    version: int = 0
    prefill_cached: int = 0


class RolloutServer:
    """All methods are called on one event loop."""

    def __init__(self, model: EmbeddedModel, limits: Limits) -> None:
        self._model = model
        self._limits = limits
        self._open, self._rejecting = True, False
        self._gate = asyncio.Condition()
        self._reading: set[asyncio.Task[None]] = set()
        self._interrupted: set[int] = set()

    async def generate(self, prompt_ids: Sequence[int], sampling: Mapping[str, Any]) -> Reply:
        """Continue the prompt.

        Raises EngineError for a parameter that cannot be honoured and ContextLengthError
        for a prompt without room behind it. How long to wait is the caller's affair.
        """
        params = read_sampling(sampling, len(prompt_ids), self._limits, self._model.max_context)
        async with self._gate:
            await self._gate.wait_for(lambda: self._open or self._rejecting)
        if not self._open:
            return Reply(version=self._model.version)
        params = self._continued(prompt_ids, params)
        reply = Reply(version=self._model.version)
        reader = asyncio.create_task(self._read(prompt_ids, params, reply))
        self._reading.add(reader)
        try:
            await asyncio.wait([reader])
        finally:
            self._reading.discard(reader)
            reader.cancel()  # only where we are cancelled ourselves
        if not reader.cancelled():
            reader.result()
        elif params.seed is not None:
            self._interrupted.add(_fingerprint(params.seed, [*prompt_ids, *reply.token_ids]))
        return reply

    async def pause(self, *, reject: bool = False) -> int:
        """End what runs, and hold what comes until `resume`, or turn it away as aborted at
        once. Returns how many replies were cut. Raises DeadlineExceeded."""
        async with self._gate:
            self._open, self._rejecting = False, reject
            self._gate.notify_all()
        cut = list(self._reading)
        for reader in cut:
            reader.cancel()
        if cut and (await asyncio.wait(cut, timeout=PAUSE_SECONDS))[1]:
            raise DeadlineExceeded(
                f"The rollout server could not be paused: a reply did not end in "
                f"{PAUSE_SECONDS:.0f} s. Its model is at: {self._model.stats().doing}."
            )
        return len(cut)

    async def resume(self) -> None:
        async with self._gate:
            self._open, self._rejecting = True, False
            self._gate.notify_all()

    async def update(self, weights: Path) -> int:
        """Take all weights from a file of `write_weights`; returns their version. A reply
        under way ends as aborted before: none has tokens of two versions."""
        was_open = self._open
        if was_open:
            await self.pause()
        version = await self._model.load(weights, optimizer=False)
        if was_open:
            await self.resume()
        return version

    def close(self) -> None:
        self._model.close()

    async def _read(self, prompt_ids: Sequence[int], params: SamplingParams, reply: Reply) -> None:
        async with aclosing(self._model.stream(prompt_ids, params)) as chunks:
            async for chunk in chunks:
                reply.token_ids += chunk.token_ids
                reply.logprobs += chunk.logprobs
                reply.version = chunk.weight_version
                reply.prefill_cached = reply.prefill_cached or chunk.prefill_cached
                if chunk.finish_reason is not None:
                    reply.stop_reason = "stop" if chunk.finish_reason == "stop" else "length"

    def _continued(self, prompt_ids: Sequence[int], params: SamplingParams) -> SamplingParams:
        """A reply that goes on after an interruption comes as a new request of the same seed:
        it must not meet the random numbers of the first part once more."""
        if params.seed is None:
            return params
        key = _fingerprint(params.seed, prompt_ids)
        if key not in self._interrupted:
            return params
        self._interrupted.discard(key)
        return replace(params, seed=key)


def _fingerprint(seed: int, ids: Sequence[int]) -> int:
    return hash((seed, *ids)) & (2**63 - 1)


def read_sampling(
    sampling: Mapping[str, Any], prompt: int, limits: Limits, max_context: int
) -> SamplingParams:
    """verl's sampling parameters (those of vLLM, or SGLang's `max_new_tokens`) as ours.

    Without a limit a reply may be as long as verl's other servers allow: `response_length`,
    and no longer than what is left of prompt and response together. Raises EngineError.
    """
    given = dict(sampling)
    if prompt >= max_context:
        raise ContextLengthError(prompt, max_context)
    room = min(limits.response_length, limits.prompt_length + limits.response_length - prompt)
    asked = [given.pop(key, None) for key in ("max_tokens", "max_new_tokens")]
    max_tokens = next((int(n) for n in asked if n is not None), room)
    top_k = given.pop("top_k", None)
    stop = frozenset(given.pop("stop_token_ids", None) or ())
    if not given.pop("ignore_eos", False):
        stop |= limits.end_tokens
    params = SamplingParams(
        max_tokens=max(1, min(max_tokens, max_context - prompt)),
        temperature=float(_given(given, "temperature", 1.0)),
        top_p=float(_given(given, "top_p", 1.0)),
        top_k=0 if top_k is None else max(int(top_k), 0),  # vLLM's -1 means all
        stop_token_ids=tuple(sorted(stop)),
        seed=given.pop("seed", None),
    )
    _refuse_others(given)
    return params


def _given(sampling: dict[str, Any], key: str, default: float) -> float:
    value = sampling.pop(key, None)
    return default if value is None else value


def _refuse_others(rest: Mapping[str, Any]) -> None:
    for name, value in rest.items():
        if name not in NEUTRAL or value not in NEUTRAL[name]:
            raise EngineError(
                f"The embedded rollout server cannot honour the sampling parameter "
                f"{name}={value!r}. It knows max_tokens, temperature, top_p, top_k, "
                "stop_token_ids, ignore_eos and seed; leave it out, or set rollout.engine: vllm."
            )
