"""The embedded engine for many: an `AdapterHost` on one device thread.

Every verb is run on the device thread in the lane of its adapter, so that one
adapter's verbs keep their order and a long one of another does not hold them up: at
a micro-batch's end the next lane has its turn. What is asked is checked before it
gets there. Names and errors are those of `AdapterBank`; it knows no users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from astuner.engine.embedded.model import no_such_function
from astuner.engine.embedded.runtime import Runtime
from astuner.engine.embedded.steps import kv_layout
from astuner.engine.protocol import (
    AdamParams,
    ForwardBackwardResult,
    HostStats,
    LoraSpec,
    LossFn,
    LossSpec,
)
from astuner.errors import ContextLengthError, EngineError
from astuner.types import Sample

if TYPE_CHECKING:
    from astuner.engine.embedded.bank import AdapterBank


class EmbeddedHost(Runtime):
    """`build` makes the bank; it is called on the device thread, and what it raises is
    raised here."""

    _bank: AdapterBank

    def __init__(
        self,
        build: Callable[[], AdapterBank],
        *,
        max_context: int = 0,
        max_num_seqs: int = 128,
        kv_cache_tokens: int = 0,
    ) -> None:
        def build_bank() -> AdapterBank:
            self._bank = build()
            return self._bank

        super().__init__(
            build_bank,
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
        max_context: int = 0,
        max_num_seqs: int = 128,
        kv_cache_tokens: int = 0,
        adapter_bytes: int = 0,
        micro_batch_tokens: int = 4096,
        gradient_checkpointing: bool = False,
        losses: Callable[[str], LossFn] | None = None,
        kls: Callable[[str], Callable[..., Any]] | None = None,
    ) -> EmbeddedHost:
        """Load the transformers folder `path` as the base.

        `adapter_bytes` bounds what adapters, optimizers and snapshots take on the device
        (the rest is swapped to host memory); 0 takes a share of a GPU's free memory. The
        others are as in `EmbeddedModel.open`. Raises ModelError.
        """

        def build() -> AdapterBank:
            from astuner.engine.embedded.bank import AdapterBank
            from astuner.engine.embedded.learner import Learner
            from astuner.engine.embedded.memory import adapter_budget
            from astuner.engine.embedded.weights import Weights, load_transformers

            model, config, tokenizer = load_transformers(path, device=device, dtype=dtype)

            def make_learner(weights: Weights) -> Learner:
                return Learner(
                    weights,
                    losses or no_such_function,
                    kls or no_such_function,
                    micro_batch_tokens=micro_batch_tokens,
                    gradient_checkpointing=gradient_checkpointing,
                )

            return AdapterBank(
                model,
                config,
                tokenizer,
                path=Path(path),
                make_learner=make_learner,
                budget=adapter_bytes or adapter_budget(next(model.parameters()).device),
            )

        return cls(
            build,
            max_context=max_context,
            max_num_seqs=max_num_seqs,
            kv_cache_tokens=kv_cache_tokens,
        )

    def stats(self) -> HostStats:
        """What is held and done; cheap, from any thread."""
        bank, thread = self._bank, self._thread
        doing = thread.doing if thread.alive else "closed"
        counters, token = self._scheduler.counters, kv_layout(bank).bytes_per_token
        sampler = counters.snapshot(0, doing, thread.last_beat)
        return HostStats(
            adapters=len(bank.trained),
            snapshots=len(bank.snapshots),
            resident_bytes=bank.residency.resident_bytes,
            swapped_bytes=bank.residency.swapped_bytes,
            swaps=bank.residency.swaps,
            running=sampler.running,
            waiting=sampler.waiting,
            queued=thread.queued,
            sampled_tokens=sampler.sampled_tokens,
            prefilled_tokens=sampler.prefilled_tokens,
            prefix_hit_tokens=sampler.prefix_hit_tokens,
            trained_tokens=bank.trained_tokens,
            tokens_per_second=sampler.tokens_per_second,
            doing=sampler.doing,
            beat_age=sampler.beat_age,
            snapshot_bytes=sum(s.nbytes for s in list(bank.snapshots.values())),
            kv_bytes=counters.pool_tokens * token,
            cache_bytes=counters.cache_tokens * token,
        )

    # ------------------------------------------------------------ training

    async def create(self, adapter: str, lora: LoraSpec, *, seed: int = 0) -> None:
        """See `AdapterHost.create`."""
        await self._run("create", partial(self._bank.create, adapter, lora, seed), adapter)

    def adapter_size(self, lora: LoraSpec) -> int:
        """See `AdapterHost.adapter_size`; from any thread."""
        return self._bank.adapter_size(lora)

    async def forward(
        self, adapter: str, samples: Sequence[Sample], *, temperature: float = 1.0
    ) -> tuple[NDArray[np.float32], ...]:
        """See `Policy.forward`."""
        self._check(samples)
        verb = partial(self._bank.forward, adapter, samples, temperature)
        return await self._run("forward", verb, adapter)

    async def forward_backward(
        self, adapter: str, samples: Sequence[Sample], loss: LossSpec
    ) -> ForwardBackwardResult:
        """See `AdapterHost.forward_backward`."""
        self._check(samples, to_train=True)
        verb = partial(self._bank.forward_backward, adapter, samples, loss)
        return await self._run("forward_backward", verb, adapter)

    async def optim_step(self, adapter: str, params: AdamParams) -> dict[str, float]:
        """See `Policy.optim_step`."""
        return await self._run(
            "optim_step", partial(self._bank.optim_step, adapter, params), adapter
        )

    async def discard(self, adapter: str) -> None:
        """See `AdapterHost.discard`."""
        await self._run("discard", partial(self._bank.discard, adapter), adapter)

    # ------------------------------------------------------------ snapshots and files

    async def snapshot(self, adapter: str) -> str:
        """See `AdapterHost.snapshot`."""
        return await self._run("snapshot", partial(self._bank.snapshot, adapter), adapter)

    async def export(self, source: str, path: Path, *, optimizer: bool = False) -> None:
        """See `AdapterHost.export`."""
        verb = partial(self._bank.export, source, path, optimizer=optimizer)
        await self._run("export", verb, source)

    async def restore(self, adapter: str, path: Path, *, optimizer: bool = False) -> None:
        """See `AdapterHost.restore`."""
        verb = partial(self._bank.restore, adapter, path, optimizer=optimizer)
        await self._run("restore", verb, adapter)

    async def open_snapshot(self, path: Path) -> str:
        """See `AdapterHost.open_snapshot`."""
        return await self._run("open_snapshot", partial(self._bank.open_snapshot, path))

    async def release(self, name: str) -> None:
        """See `AdapterHost.release`."""
        await self._run("release", partial(self._release, name), name)

    def _release(self, name: str) -> None:
        if self._bank.release(name):
            ended = f"The weights {name!r} were released while they were sampling."
            self._scheduler.forget(name, EngineError(ended))

    # ------------------------------------------------------------ what is asked

    def _check(self, samples: Sequence[Sample], *, to_train: bool = False) -> None:
        """What would otherwise fail on the device, where a wrong id ends a GPU's work for
        everybody."""
        for sample in samples:
            what = f"Sample {sample.sample_id!r}"
            if len(sample.token_ids) - 1 > self.max_context:
                raise ContextLengthError(len(sample.token_ids) - 1, self.max_context)
            self._check_tokens(what, sample.token_ids)
            if sample.target_ids is not None:
                self._check_tokens(what, sample.target_ids)
            for name in ("loss_mask", "logprobs", "target_ids", "advantages", "weights"):
                array: NDArray[Any] | None = getattr(sample, name)
                if array is None and not (to_train and name in ("advantages", "weights")):
                    continue
                if array is None or array.shape != sample.token_ids.shape:
                    seen = "missing" if array is None else f"of shape {array.shape}"
                    raise EngineError(
                        f"{what}: {name} is {seen}; there are {len(sample.token_ids)} tokens."
                    )
            if sample.loss_mask[0]:
                raise EngineError(f"{what}: its first token cannot be trained or scored.")
