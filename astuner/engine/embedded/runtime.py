"""A loaded model at work: its device thread, and the sampler that ticks on it.

What `EmbeddedModel` (one policy) and `EmbeddedHost` (many adapters) have in common:
streams, scores, and running a verb on the device thread. May be used from any number
of threads and event loops. It trains nothing and computes nothing itself.
"""

from __future__ import annotations

import asyncio
import atexit
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from astuner.engine.embedded.device_thread import DeviceThread, Steps
from astuner.engine.embedded.kv_cache import KVPool
from astuner.engine.embedded.mailbox import Mailbox
from astuner.engine.embedded.memory import kv_budgets
from astuner.engine.embedded.prefix_cache import PrefixCache
from astuner.engine.embedded.requests import Request
from astuner.engine.embedded.scheduler import Scheduler
from astuner.engine.embedded.scoring import score
from astuner.engine.embedded.steps import SamplingWeights, kv_layout
from astuner.engine.protocol import SamplingParams, Scores, TokenChunk
from astuner.errors import ConfigError, ContextLengthError, EngineError
from astuner.types import TokenIds, token_ids

T = TypeVar("T")


class ModelWeights(SamplingWeights, Protocol):
    """What is needed beyond what sampling does."""

    max_context: int
    tokenizer: Any


class Runtime:
    """`build` makes the weights; it is called on the device thread, and what it raises is
    raised here."""

    def __init__(
        self,
        build: Callable[[], ModelWeights],
        *,
        max_context: int = 0,
        max_num_seqs: int = 128,
        kv_cache_tokens: int = 0,
    ) -> None:
        if max_num_seqs < 1:
            raise ConfigError(f"rollout.max_num_seqs must be at least 1; it is {max_num_seqs}.")
        self._max_num_seqs = max_num_seqs
        self._kv_cache_tokens = kv_cache_tokens
        self._thread = DeviceThread()
        try:
            self._thread.submit("load", partial(self._build, build, max_context)).result()
        except BaseException:
            self._thread.close()
            raise
        atexit.register(self.close)

    def _build(self, build: Callable[[], ModelWeights], max_context: int) -> None:
        self._served = build()
        own = self._served.max_context
        self.max_context = min(max_context, own) if max_context else own
        layout = kv_layout(self._served)
        budgets = kv_budgets(
            layout,
            max_num_seqs=self._max_num_seqs,
            max_context=self.max_context,
            kv_cache_tokens=self._kv_cache_tokens,
        )
        self._scheduler = Scheduler(
            self._served,
            max_context=self.max_context,
            max_num_seqs=self._max_num_seqs,
            pool=KVPool(layout, budgets.pool, self.max_context),
            cache=PrefixCache(layout, budgets.cache),
        )
        self._thread.sampler = self._scheduler

    @property
    def tokenizer(self) -> Any:
        """The folder's transformers tokenizer."""
        return self._served.tokenizer

    def close(self) -> None:
        """Stop; whoever still waits gets EngineClosed. May be called twice."""
        atexit.unregister(self.close)
        self._thread.close()

    # ------------------------------------------------------------ sampling

    def stream(
        self,
        prompt_ids: Sequence[int] | TokenIds,
        params: SamplingParams,
        *,
        weights: str = "",
        tenant: str = "",
    ) -> AsyncGenerator[TokenChunk]:
        """Continue `prompt_ids`; closing the iterator frees the slot within a tick.

        Raises ContextLengthError or EngineError at once for a request that cannot be
        served, and EngineClosed, or EngineError for a failure, while iterating.
        """
        prompt = token_ids(prompt_ids)
        _check_params(params)
        if len(prompt) >= self.max_context:
            raise ContextLengthError(len(prompt), self.max_context)
        self._check_tokens("The prompt", prompt)
        return self._stream(prompt, params, weights, tenant)

    async def _stream(
        self, prompt: TokenIds, params: SamplingParams, weights: str, tenant: str
    ) -> AsyncGenerator[TokenChunk]:
        mailbox = Mailbox(whole=params.whole)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        request = Request(prompt, params, seed, mailbox, weights, tenant)
        self._thread.post(partial(self._scheduler.add, request))
        try:
            finished = False
            while not finished:
                chunk = await mailbox.take()
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            mailbox.cancelled = True

    async def score(
        self, prompt_ids: Sequence[int] | TokenIds, *, weights: str = "", top_k: int = 0
    ) -> Scores:
        """The logprobs of the tokens themselves; see `AdapterHost.score`."""
        tokens = token_ids(prompt_ids)
        if len(tokens) > self.max_context:
            raise ContextLengthError(len(tokens), self.max_context)
        self._check_tokens("The text", tokens)
        verb = partial(score, self._served, weights, tokens, top_k)
        return await self._run("score", verb, lane=f"score {weights}")

    def _check_tokens(self, what: str, tokens: TokenIds) -> None:
        if len(tokens) == 0:
            raise EngineError(f"{what} has no tokens; give at least one (e.g. the BOS token).")
        vocab = self._served.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocab:
            bad = next(int(t) for t in tokens if not 0 <= t < vocab)
            raise EngineError(
                f"{what} has the token id {bad}, but the model's ids are 0 to {vocab - 1}. "
                "Is the tokenizer that of this model?"
            )

    # ------------------------------------------------------------ verbs

    async def _run(self, name: str, verb: Callable[[], T | Steps[T]], lane: str = "") -> T:
        """Run a verb on the device thread, after the others of its lane. Cancelled, a long one
        ends before its next step, as if it had failed there."""
        return await asyncio.wrap_future(self._thread.submit(name, verb, lane))


def _check_params(params: SamplingParams) -> None:
    wrong = {
        "max_tokens must be at least 1": params.max_tokens < 1,
        "temperature must be a number from 0": not 0 <= params.temperature < float("inf"),
        "top_p must be above 0 and at most 1": not 0 < params.top_p <= 1,
        "top_k must be at least 0": params.top_k < 0,
        "top_logprobs must be at least 0": params.top_logprobs < 0,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            name = message.split(" ", 1)[0]
            raise EngineError(f"{message}; it is {getattr(params, name)!r}.")
