"""The embedded model: an `Engine` and a `Policy` in one object, on one device thread.

A `Runtime` with weights that are trained, and published to those that sample. May be
used from any number of threads and event loops. It computes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from astuner.engine.embedded import runtime
from astuner.engine.embedded.device_thread import Steps
from astuner.engine.embedded.runtime import Runtime
from astuner.engine.embedded.stats import EngineStats
from astuner.engine.protocol import AdamParams, ForwardBackwardResult, LossFn, LossSpec
from astuner.errors import EngineError
from astuner.types import Sample

if TYPE_CHECKING:
    from astuner.engine.embedded.weights import LoraSpec


class ModelWeights(runtime.ModelWeights, Protocol):
    """What the composition needs beyond what sampling does."""

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


class EmbeddedModel(Runtime):
    """`build` makes weights and learner; it is called on the device thread, and what it
    raises is raised here."""

    _weights: ModelWeights
    _learner: Trainable

    def __init__(
        self,
        build: Callable[[], tuple[ModelWeights, Trainable]],
        *,
        max_context: int = 0,
        max_num_seqs: int = 128,
        kv_cache_tokens: int = 0,
    ) -> None:
        def build_both() -> ModelWeights:
            self._weights, self._learner = build()
            return self._weights

        super().__init__(
            build_both,
            max_context=max_context,
            max_num_seqs=max_num_seqs,
            kv_cache_tokens=kv_cache_tokens,
        )

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
                losses or no_such_function,
                kls or no_such_function,
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

    # ------------------------------------------------------------ about

    @property
    def version(self) -> int:
        """Of the published weights."""
        return self._weights.version_of("")

    def stats(self) -> EngineStats:
        """What has been and is being done; cheap, from any thread."""
        thread = self._thread
        return self._scheduler.counters.snapshot(self.version, thread.doing, thread.last_beat)

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


def no_such_function(name: str) -> Callable[..., Any]:
    raise EngineError(
        f"The loss or KL function {name!r} was asked for, but the model was opened without "
        "any: it only samples. Pass `losses` and `kls` when opening it."
    )
