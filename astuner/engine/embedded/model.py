"""The embedded model: an `Engine` and a `Policy` in one object, on one device thread.

Composes the parts: weights and learner (training), scheduler, KV pool and
prefix cache (sampling), and the thread on which all of them run. May be used
from any number of threads and event loops. It computes nothing itself.
"""

from __future__ import annotations

import asyncio
import atexit
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from astuner.engine.embedded.device_thread import DeviceThread, Steps
from astuner.engine.embedded.kv_cache import KVPool
from astuner.engine.embedded.mailbox import Mailbox
from astuner.engine.embedded.memory import kv_budgets
from astuner.engine.embedded.prefix_cache import PrefixCache
from astuner.engine.embedded.scheduler import Request, Scheduler
from astuner.engine.embedded.stats import EngineStats
from astuner.engine.embedded.steps import SamplingWeights, kv_layout
from astuner.engine.protocol import (
    AdamParams,
    ForwardBackwardResult,
    LossFn,
    LossSpec,
    SamplingParams,
    TokenChunk,
)
from astuner.errors import ConfigError, ContextLengthError, EngineError
from astuner.types import Sample, TokenIds, token_ids

if TYPE_CHECKING:
    from astuner.engine.embedded.weights import LoraSpec

T = TypeVar("T")


class ModelWeights(SamplingWeights, Protocol):
    """What the composition needs beyond what sampling does."""

    max_context: int
    tokenizer: Any

    def publish(self) -> int: ...


class Trainable(Protocol):
    """The training verbs; all are called on the device thread."""

    def forward(
        self, samples: Sequence[Sample], *, temperature: float
    ) -> Steps[tuple[NDArray[np.float32], ...]]: ...
    def forward_backward(
        self, samples: Sequence[Sample], loss: LossSpec
    ) -> Steps[ForwardBackwardResult]: ...
    def optim_step(self, params: AdamParams) -> dict[str, float]: ...
    def save(self, path: Path, *, optimizer: bool) -> None: ...
    def load(self, path: Path, *, optimizer: bool) -> None: ...


class EmbeddedModel:
    """`build` makes weights and learner; it is called on the device thread, and what it
    raises is raised here."""

    def __init__(
        self,
        build: Callable[[], tuple[ModelWeights, Trainable]],
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

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        lora: LoraSpec | None = None,
        max_context: int = 0,
        max_num_seqs: int = 128,
        kv_cache_tokens: int = 0,
        micro_batch_tokens: int = 4096,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        losses: Callable[[str], LossFn] | None = None,
        kls: Callable[[str], Callable[..., Any]] | None = None,
    ) -> EmbeddedModel:
        """Load the transformers folder `path`. (`load` is the Policy's verb.)

        `max_context` 0 takes the model's own; `kv_cache_tokens` 0 chooses by free memory;
        `lora` None trains all weights. `losses` and `kls` look up loss functions and KL
        estimators by name; without them the model only samples. Raises ModelError.
        """

        def build() -> tuple[ModelWeights, Trainable]:
            from astuner.engine.embedded.learner import Learner
            from astuner.engine.embedded.weights import Weights

            weights = Weights.load(path, device=device, dtype=dtype, lora=lora, seed=seed)
            learner = Learner(
                weights,
                losses or _no_such_function,
                kls or _no_such_function,
                micro_batch_tokens=micro_batch_tokens,
                gradient_checkpointing=gradient_checkpointing,
            )
            return weights, learner

        return cls(
            build,
            max_context=max_context,
            max_num_seqs=max_num_seqs,
            kv_cache_tokens=kv_cache_tokens,
        )

    def _build(self, build: Callable[[], tuple[ModelWeights, Trainable]], max_context: int) -> None:
        self._weights, self._learner = build()
        own = self._weights.max_context
        self.max_context = min(max_context, own) if max_context else own
        layout = kv_layout(self._weights)
        budgets = kv_budgets(
            layout,
            max_num_seqs=self._max_num_seqs,
            max_context=self.max_context,
            kv_cache_tokens=self._kv_cache_tokens,
        )
        self._scheduler = Scheduler(
            self._weights,
            max_context=self.max_context,
            max_num_seqs=self._max_num_seqs,
            pool=KVPool(layout, budgets.pool, self.max_context),
            cache=PrefixCache(layout, budgets.cache),
        )
        self._thread.sampler = self._scheduler

    # ------------------------------------------------------------ about

    @property
    def tokenizer(self) -> Any:
        """The folder's transformers tokenizer."""
        return self._weights.tokenizer

    @property
    def version(self) -> int:
        """Of the published weights."""
        return self._weights.version_of("")

    def stats(self) -> EngineStats:
        """What has been and is being done; cheap, from any thread."""
        thread = self._thread
        return self._scheduler.counters.snapshot(self.version, thread.doing, thread.last_beat)

    def close(self) -> None:
        """Stop; whoever still waits gets EngineClosed. May be called twice."""
        atexit.unregister(self.close)
        self._thread.close()

    # ------------------------------------------------------------ Engine

    def stream(
        self, prompt_ids: Sequence[int] | TokenIds, params: SamplingParams
    ) -> AsyncGenerator[TokenChunk]:
        """Continue `prompt_ids`; closing the iterator frees the slot within a tick.

        Raises ContextLengthError or EngineError at once for a request that cannot be
        served, and EngineClosed, or EngineError for a failure, while iterating.
        """
        prompt = token_ids(prompt_ids)
        _check_params(params)
        self._check_prompt(prompt)
        return self._stream(prompt, params)

    async def _stream(self, prompt: TokenIds, params: SamplingParams) -> AsyncGenerator[TokenChunk]:
        mailbox = Mailbox()
        seed = secrets.randbits(63) if params.seed is None else params.seed
        request = Request(prompt, params, seed, mailbox)
        self._thread.post(partial(self._scheduler.add, request))
        try:
            finished = False
            while not finished:
                chunk = await mailbox.take()
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            mailbox.cancelled = True

    def _check_prompt(self, prompt: TokenIds) -> None:
        if len(prompt) == 0:
            raise EngineError("The prompt has no tokens; give at least one (e.g. the BOS token).")
        if len(prompt) >= self.max_context:
            raise ContextLengthError(len(prompt), self.max_context)
        vocab = self._weights.vocab_size
        if prompt.min() < 0 or prompt.max() >= vocab:
            bad = next(int(t) for t in prompt if not 0 <= t < vocab)
            raise EngineError(
                f"The prompt has the token id {bad}, but the model's ids are 0 to {vocab - 1}. "
                "Is the tokenizer that of this model?"
            )

    # ------------------------------------------------------------ Policy

    async def forward(
        self, samples: Sequence[Sample], *, temperature: float = 1.0
    ) -> tuple[NDArray[np.float32], ...]:
        """See `Policy.forward`."""
        verb = partial(self._learner.forward, samples, temperature=temperature)
        return await self._run("forward", verb)

    async def forward_backward(
        self, samples: Sequence[Sample], loss: LossSpec
    ) -> ForwardBackwardResult:
        """See `Policy.forward_backward`."""
        verb = partial(self._learner.forward_backward, samples, loss)
        return await self._run("forward_backward", verb)

    async def optim_step(self, params: AdamParams) -> dict[str, float]:
        """See `Policy.optim_step`."""
        return await self._run("optim_step", partial(self._learner.optim_step, params))

    async def publish(self) -> int:
        """See `Policy.publish`. Running sequences go on under the new weights."""
        return await self._run("publish", self._publish)

    async def save(self, path: Path, *, optimizer: bool) -> None:
        """See `Policy.save`."""
        await self._run("save", partial(self._learner.save, path, optimizer=optimizer))

    async def load(self, path: Path, *, optimizer: bool) -> int:
        """See `Policy.load`."""

        def verb() -> int:
            self._learner.load(path, optimizer=optimizer)  # publishes
            self._scheduler.weights_changed()
            return self._weights.version_of("")

        return await self._run("load", verb)

    def _publish(self) -> int:
        version = self._weights.publish()
        self._scheduler.weights_changed()
        return version

    async def _run(self, name: str, verb: Callable[[], T | Steps[T]]) -> T:
        return await asyncio.wrap_future(self._thread.submit(name, verb))


def _no_such_function(name: str) -> Callable[..., Any]:
    raise EngineError(
        f"The loss or KL function {name!r} was asked for, but the model was opened without "
        "any: it only samples. Pass `losses` and `kls` to EmbeddedModel.open."
    )


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
