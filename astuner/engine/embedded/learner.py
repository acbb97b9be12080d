"""Forward, backward and optimizer step over packed rows of samples.

The long verbs are generators that yield after every micro-batch, outside of any
context of `Weights`, so that the device thread can decode in between; their result
is the generator's return value. The loss and KL functions are injected by name:
nothing here knows which algorithm runs. Everything runs on the device thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from astuner.engine.embedded import checkpoint, packed
from astuner.engine.embedded.logprobs import token_logprobs
from astuner.engine.embedded.losses import KlFn, loss_input, loss_of, non_finite, sampler_gap
from astuner.engine.embedded.masters import Masters
from astuner.engine.embedded.metrics import TokenMeans
from astuner.engine.embedded.packing import Row, pack, padded
from astuner.engine.embedded.tree_plan import TreePlan
from astuner.engine.embedded.weights import Weights
from astuner.engine.protocol import (
    AdamParams,
    ForwardBackwardResult,
    LossFn,
    LossSpec,
)
from astuner.errors import EngineError
from astuner.types import Sample

Floats = NDArray[np.float32]


class Learner:
    """The training half of the embedded model.

    `micro_batch_tokens` bounds the nodes of one row (see `packing.pack`), and with it
    memory; it never changes the gradient beyond rounding.
    """

    def __init__(
        self,
        weights: Weights,
        losses: Callable[[str], LossFn],
        kls: Callable[[str], KlFn],
        *,
        micro_batch_tokens: int,
        gradient_checkpointing: bool = False,
    ) -> None:
        self._weights = weights
        self._losses = losses
        self._kls = kls
        self._budget = micro_batch_tokens
        self._masters: Masters | None = None
        if gradient_checkpointing:
            weights.states.checkpoint_activations()

    @property
    def masters(self) -> Masters:
        """Made when first needed: an adapter that is not trained yet has none."""
        if self._masters is None:
            self._masters = Masters(self._weights.states.trained())
        return self._masters

    @property
    def nbytes(self) -> int:
        """Of the masters, gradients and moments."""
        return 0 if self._masters is None else self._masters.nbytes

    def move(self, device: torch.device) -> None:
        """Keep the masters on `device` from now on."""
        if self._masters is not None:
            self._masters.move(device)

    def discard(self) -> None:
        """Forget the gradient."""
        if self._masters is not None:
            self._masters.discard()

    # ------------------------------------------------------------ verbs

    def forward(
        self, samples: Sequence[Sample], *, temperature: float = 1.0
    ) -> Generator[None, None, tuple[Floats, ...]]:
        """Logprobs [T] of each sample's trained tokens, 0 elsewhere, under the trained
        weights."""
        logprobs = _blank(samples)
        for row in pack(samples, self._budget):
            with self._weights.training() as model, torch.no_grad():
                logprobs_N, _ = self._row_logprobs(model, row, temperature)
            _scatter(logprobs_N, row, samples, logprobs)
            yield
        return tuple(logprobs)

    def forward_backward(
        self, samples: Sequence[Sample], loss: LossSpec
    ) -> Generator[None, None, ForwardBackwardResult]:
        """Add the gradient of the loss over these samples to what is there.

        Raises EngineError, naming the sample, when a sample has no advantages or weights
        (before anything is computed), or when a loss is not finite. A failure on the way,
        like giving it up, leaves no gradient at all rather than a part of one: what other
        calls have added since the last step is gone too.
        """
        _check(samples)
        logprobs, means, total_loss = _blank(samples), TokenMeans(), 0.0
        rows = pack(samples, self._budget)
        whole = False
        try:
            for row in rows:
                loss_value, logprobs_N = self._micro_batch(row, samples, loss, means)
                total_loss += loss_value
                _scatter(logprobs_N, row, samples, logprobs)
                yield
            whole = True
        finally:
            if not whole:
                self.discard()
        metrics = means.result() | {
            "packed_tokens": float(sum(len(r.ids_T) for r in rows)),
            "sample_tokens": float(sum(len(samples[i].token_ids) for r in rows for i in r.samples)),
            "trained_tokens": float(sum(len(r.targets_N) for r in rows)),
            "micro_batches": float(len(rows)),
        }
        return ForwardBackwardResult(total_loss, tuple(logprobs), metrics)

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        """Apply and clear the gradient: `grad_norm` (before clipping) and `lr`.

        Without a gradient since the last step nothing is changed, not even the moments:
        then `skipped` is 1. Raises EngineError when the gradient is not finite.
        """
        if not self.masters.pending:
            return {"grad_norm": 0.0, "lr": params.lr, "skipped": 1.0}
        return {"grad_norm": self.masters.step(params), "lr": params.lr, "skipped": 0.0}

    def save(self, path: Path, *, optimizer: bool) -> None:
        """Write the trained weights (and all that a resume needs) into the folder `path`.

        Raises CheckpointError; a file under its final name is always whole.
        """
        checkpoint.save(path, self._weights, self.masters, optimizer=optimizer)

    def load(self, path: Path, *, optimizer: bool) -> None:
        """Read what `save` wrote, drop any gradient, and publish. With `optimizer` the
        version is the saved one; otherwise it counts on."""
        self.restore(path, optimizer=optimizer)
        version = self._weights.version
        self._weights.publish()
        self._weights.version = version

    def restore(self, path: Path, *, optimizer: bool) -> None:
        """`load`, without publishing."""
        checkpoint.load(path, self._weights, self.masters, optimizer=optimizer)

    # ------------------------------------------------------------ one micro-batch

    def _micro_batch(
        self, row: Row, samples: Sequence[Sample], spec: LossSpec, means: TokenMeans
    ) -> tuple[float, Tensor]:
        """Forward, loss and backward of one row; its loss and its logprobs [N]."""
        self.masters.drop_partial()
        reference_N = self._reference(row, spec)
        with self._weights.training() as model:
            logprobs_N, entropy_R = self._row_logprobs(model, row, spec.temperature)
            chosen = [samples[i] for i in row.samples]
            inputs = loss_input(logprobs_N, reference_N, row.segments_N, chosen)
            loss, metrics = loss_of(inputs, spec, self._losses, self._kls)
            value = float(loss.detach())
            if not np.isfinite(value):
                raise non_finite(value, inputs, chosen, spec)
            torch.autograd.backward(loss)
            self.masters.collect()
        entropy_N = entropy_R[self._to_device(row.source_N)]
        means.add(metrics | sampler_gap(inputs) | {"entropy": entropy_N})
        return value, logprobs_N.detach()

    def _reference(self, row: Row, spec: LossSpec) -> Tensor | None:
        if spec.kl_coef <= 0:
            return None
        with self._weights.reference() as model:
            return self._row_logprobs(model, row, spec.temperature)[0]

    def _row_logprobs(
        self, model: nn.Module, row: Row, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Logprobs [N] of the row's trained tokens, and entropies [>= R]. Temperature 0 is
        greedy sampling, whose logprobs are of the untempered distribution."""
        device, dtype = self._weights.device, self._weights.dtype
        if device.type == "cpu":
            row = padded(row, packed.ROWS)
        plan = TreePlan(row.ends_T, row.positions_T, device=device, dtype=dtype)
        to = self._to_device
        logits_RV = packed.forward(
            model, to(row.ids_T), to(row.positions_T), plan, to(row.sources_R)
        )
        return token_logprobs(logits_RV, to(row.source_N), to(row.targets_N), temperature or 1.0)

    def _to_device(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._weights.device)


# ---------------------------------------------------------------- samples and tensors


def _check(samples: Sequence[Sample]) -> None:
    for sample in samples:
        missing = [n for n in ("advantages", "weights") if getattr(sample, n) is None]
        if missing:
            raise EngineError(
                f"Sample {sample.sample_id!r} has no {' and no '.join(missing)}: the trainer "
                "must set them before forward_backward."
            )


def _blank(samples: Sequence[Sample]) -> list[Floats]:
    return [np.zeros(len(s.token_ids), np.float32) for s in samples]


def _scatter(
    logprobs_N: Tensor, row: Row, samples: Sequence[Sample], into: Sequence[Floats]
) -> None:
    values = logprobs_N.float().cpu().numpy()
    start = 0
    for index in row.samples:
        mask = samples[index].loss_mask
        stop = start + int(mask.sum())
        into[index][mask] = values[start:stop]
        start = stop
