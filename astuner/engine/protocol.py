"""The two necks of the hourglass: `Engine` (tokens in, tokens out) and `Policy`.

No messages, no templates and no HTTP below this line. Everything above speaks
to an engine only through `stream` and to trainable weights only through the
few verbs of `Policy` (those of the Tinker API). `AdapterHost` is both for many
adapters over one base. All may be called from any event loop of any thread; an
implementation serves them all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from astuner.types import FinishReason, Sample, TokenIds, token_ids

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw tokens. `top_p < 1` or `top_k > 0` truncate the distribution; the
    returned logprobs are of the truncated, tempered distribution really drawn from."""

    max_tokens: int
    temperature: float = 1.0
    """0 means greedy: logprobs are then of the untempered distribution."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all."""
    stop_token_ids: tuple[int, ...] = ()
    """Sampling ends after one of these; it is part of the returned tokens."""
    seed: int | None = None
    """Same prompt, weights, params and seed give the same tokens, whatever else is in
    the batch. None draws a fresh one."""
    top_logprobs: int = 0
    """How many alternatives to report for each token."""
    session: str = ""
    """Whose call it is: an engine of several replicas may keep a session on one, for its
    prefix cache. Never changes what is sampled."""
    whole: bool = False
    """Nobody looks at the reply before it is finished: an engine may hand over all of it in
    one chunk, and spare its reader the other ones."""


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """One or more tokens, as they come. The last chunk of a stream has a finish reason
    (and may have no tokens)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_version: int
    finish_reason: FinishReason | None = None
    top_logprobs: tuple[Mapping[int, float], ...] = ()
    """For each token, token id -> logprob; empty unless asked for."""
    prefill_cached: int = 0
    """Prompt tokens whose KV was reused; set on the first chunk."""


@runtime_checkable
class Engine(Protocol):
    """Anything that continues token ids."""

    max_context: int
    """Prompt plus completion may not exceed this many tokens."""

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncIterator[TokenChunk]:
        """Continue `prompt_ids`. Closing the iterator cancels the work.

        Raises ContextLengthError when the prompt fills the context, EngineClosed
        when the engine is stopped, EngineError for anything else it cannot do. The
        completion is cut with finish reason "length" where the context ends.
        """
        ...


@dataclass(frozen=True, slots=True)
class Completion:
    """All chunks of one stream, joined. Arrays have shape [T]."""

    token_ids: TokenIds
    logprobs: NDArray[np.float32]
    weight_versions: NDArray[np.int32]
    finish_reason: FinishReason
    top_logprobs: tuple[Mapping[int, float], ...] = ()
    prefill_cached: int = 0


async def generate(engine: Engine, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
    """Collect `engine.stream(...)` into one Completion."""
    ids: list[int] = []
    logprobs: list[float] = []
    versions: list[int] = []
    top: list[Mapping[int, float]] = []
    finish: FinishReason = "cancelled"
    cached = 0
    async for chunk in engine.stream(prompt_ids, params):
        ids.extend(chunk.token_ids)
        logprobs.extend(chunk.logprobs)
        versions.extend([chunk.weight_version] * len(chunk.token_ids))
        top.extend(chunk.top_logprobs)
        cached = cached or chunk.prefill_cached
        finish = chunk.finish_reason or finish
    return Completion(
        token_ids(ids),
        np.asarray(logprobs, np.float32),
        np.asarray(versions, np.int32),
        finish,
        tuple(top),
        cached,
    )


# ---------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class LossSpec:
    """Which loss to take, by name, so that it can travel to a remote trainer."""

    name: str
    """A key of the loss registry, e.g. "ppo", "gspo", "cispo", "importance_sampling"."""
    params: Mapping[str, float] = field(default_factory=dict)
    """The loss function's own keyword arguments, e.g. clip_low, clip_high."""
    kl_coef: float = 0.0
    """> 0 adds this times the KL to the reference (the adapter switched off)."""
    kl_type: str = "k3"
    """A key of the KL estimator registry."""
    temperature: float = 1.0
    """Logits are divided by this before the softmax: that of the rollout, so that
    trainer and sampler speak of the same distribution."""


@dataclass(frozen=True, slots=True)
class LossInput:
    """What a loss function sees: the N trained tokens of one micro-batch, flat.

    All tensors have shape [N]; a sample's tokens are never split over two inputs.
    """

    logprobs: torch.Tensor
    """Under the weights being trained; carries the gradient."""
    behaviour_logprobs: torch.Tensor
    """Under the weights that sampled, as recorded."""
    proximal_logprobs: torch.Tensor
    """Under the weights at the start of the step; equals `logprobs.detach()` if unknown."""
    reference_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    weights: torch.Tensor
    segments: torch.Tensor
    """int64: which sample each token belongs to, 0..num_segments-1."""
    num_segments: int


@dataclass(frozen=True, slots=True)
class LossOutput:
    loss: torch.Tensor
    """Scalar: sum over tokens of weight * token loss."""
    metrics: Mapping[str, torch.Tensor]
    """Detached per-token values [N]; the policy averages them over all trained tokens."""


LossFn = Callable[..., LossOutput]
"""`(inputs: LossInput, **params) -> LossOutput`; a pure function from `algorithm/`."""


@dataclass(frozen=True, slots=True)
class AdamParams:
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches it off."""


@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    loss: float
    logprobs: tuple[NDArray[np.float32], ...]
    """For each sample, in the order given, [T]: 0 where the loss mask is false."""
    metrics: Mapping[str, float]
    """Means over trained tokens of the loss's metrics, plus what the engine measured:
    `packed_tokens` (positions really computed) and `sample_tokens` (before packing)."""


@runtime_checkable
class Policy(Protocol):
    """Trainable weights. Gradients accumulate until `optim_step`."""

    async def forward(
        self, samples: Sequence[Sample], *, temperature: float = 1.0
    ) -> tuple[NDArray[np.float32], ...]:
        """Logprobs [T] of each sample's trained tokens under the weights being trained."""
        ...

    async def forward_backward(
        self, samples: Sequence[Sample], loss: LossSpec
    ) -> ForwardBackwardResult:
        """Add the gradient of the loss over these samples. Needs `advantages` and
        `weights` on every sample; raises EngineError on a non-finite loss. Failed or
        cancelled on the way, it leaves no gradient: what was there is gone too."""
        ...

    async def optim_step(self, params: AdamParams) -> dict[str, float]:
        """Apply and clear the gradients; returns `grad_norm` (before clipping) and `lr`."""
        ...

    async def publish(self) -> int:
        """Make the trained weights the ones that sample; returns their version."""
        ...

    async def save(self, path: Path, *, optimizer: bool) -> None:
        """Write weights (and optimizer state) into the folder `path`."""
        ...

    async def load(self, path: Path, *, optimizer: bool) -> int:
        """Read what `save` wrote, and publish it; returns the version that samples now."""
        ...


# ---------------------------------------------------------------- many adapters on one base


@dataclass(frozen=True)
class LoraSpec:
    """The shape of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = 16
    alpha: float = 32
    """The adapter's output is scaled by alpha / rank."""
    target_modules: str | Sequence[str] = "all-linear"
    """"all-linear" (every linear layer but the output embedding), or names, in a list or
    separated by commas: of layers ("q_proj"), or of parts of the model: "attn", "mlp",
    "unembed"."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model thinks of given tokens."""

    logprobs: NDArray[np.float32]
    """[T], at temperature 1, each given the tokens before it; NaN at position 0."""
    top: tuple[Mapping[int, float], ...] = ()
    """For each position the most probable ids and their logprobs (none at position 0);
    empty unless asked for."""


@dataclass(frozen=True, slots=True)
class HostStats:
    """A snapshot of what a host holds and does. Token counts are since loading."""

    adapters: int
    snapshots: int
    resident_bytes: int
    """Of adapters, their optimizers and snapshots, on the device."""
    swapped_bytes: int
    """The same, in host memory for want of room on the device."""
    swaps: int
    """Times something was brought back from host memory."""
    running: int
    """Sequences being sampled."""
    waiting: int
    """Sequences that wait for room."""
    queued: int
    """Verbs that wait for the device thread."""
    sampled_tokens: int
    prefilled_tokens: int
    prefix_hit_tokens: int
    trained_tokens: int
    """Tokens that went through a backward pass."""
    tokens_per_second: float
    """Sampled, over the last ten seconds."""
    doing: str
    """What the device is at: "idle", "sampling", a verb's name, or "closed"."""
    beat_age: float
    """Seconds since it turned to that."""
    snapshot_bytes: int = 0
    """Of the snapshots alone, wherever they are."""
    kv_bytes: int = 0
    """Memory taken for the keys and values of running sequences."""
    cache_bytes: int = 0
    """The same of the prefix cache."""


@runtime_checkable
class AdapterHost(Protocol):
    """One frozen base model and any number of LoRA adapters, trained and sampled apart.

    Knows no users: names are unique over all of them, and whoever knows a name may use
    it. Every verb raises EngineError for a name that is not there (or not any more).
    The verbs of one adapter take effect in the order in which they were called.
    """

    max_context: int

    @property
    def tokenizer(self) -> Any: ...

    async def create(self, adapter: str, lora: LoraSpec, *, seed: int = 0) -> None:
        """A new trainable adapter that does not change the base's output yet. Raises
        EngineError for a name that is taken, ModelError when the spec does not fit."""
        ...

    def adapter_size(self, lora: LoraSpec) -> int:
        """How many numbers such an adapter has. Raises ModelError when the spec does not fit."""
        ...

    async def forward(
        self, adapter: str, samples: Sequence[Sample], *, temperature: float = 1.0
    ) -> tuple[NDArray[np.float32], ...]:
        """See `Policy.forward`."""
        ...

    async def forward_backward(
        self, adapter: str, samples: Sequence[Sample], loss: LossSpec
    ) -> ForwardBackwardResult:
        """See `Policy.forward_backward`; gradients accumulate for each adapter. A failure
        touches no other adapter."""
        ...

    async def optim_step(self, adapter: str, params: AdamParams) -> dict[str, float]:
        """See `Policy.optim_step`."""
        ...

    async def discard(self, adapter: str) -> None:
        """Forget the gradient."""
        ...

    async def snapshot(self, adapter: str) -> str:
        """The adapter's weights as they are now, for sampling; returns their id.

        They never change. The same id comes again, and must be released once more, as
        long as the adapter has not changed.
        """
        ...

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        weights: str = "",
        tenant: str = "",
    ) -> AsyncIterator[TokenChunk]:
        """See `Engine.stream`. `weights` is a snapshot's id, or "" for the base. The KV of
        prompts is shared only between streams of the same weights and the same tenant.
        The chunks' weight version is the number of steps the adapter had taken."""
        ...

    async def score(
        self, prompt_ids: Sequence[int], *, weights: str = "", top_k: int = 0
    ) -> Scores:
        """The logprobs of the tokens themselves, under a snapshot or the base, and for each
        position the `top_k` most probable ids."""
        ...

    async def export(self, source: str, path: Path, *, optimizer: bool = False) -> None:
        """Write an adapter or a snapshot into the folder `path` as PEFT does; of an adapter
        also all that going on bitwise needs, with `optimizer`. Raises CheckpointError."""
        ...

    async def restore(self, adapter: str, path: Path, *, optimizer: bool = False) -> None:
        """Read what `export` wrote into an adapter of the same shape. Gradients are dropped,
        and without `optimizer` moments too. Raises CheckpointError."""
        ...

    async def open_snapshot(self, path: Path) -> str:
        """A PEFT folder as weights for sampling; returns a new id. Raises CheckpointError."""
        ...

    async def release(self, name: str) -> None:
        """Forget an adapter, or give back one hold on a snapshot; with the last one gone,
        streams that still run under it end with EngineError."""
        ...

    def stats(self) -> HostStats: ...
