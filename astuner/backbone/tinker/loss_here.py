"""The loss, its metrics and its gradient by the logprobs, from logprobs that a service gave.

By the functions that the embedded learner uses, on the CPU: a few numbers a token. What
becomes of the gradient is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from astuner.engine.embedded.losses import KlFn, loss_input, loss_of, non_finite, sampler_gap
from astuner.engine.embedded.metrics import TokenMeans
from astuner.engine.protocol import LossFn, LossSpec
from astuner.errors import EngineError
from astuner.types import Sample

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Taken:
    """A loss over samples."""

    loss: float
    metrics: dict[str, float]
    """Means over the trained tokens."""
    gradient: tuple[Floats, ...]
    """dL/dlogpi, [T] for each sample; 0 where the loss mask is false."""


def take_loss(
    samples: Sequence[Sample],
    logprobs: Sequence[Floats],
    reference: Sequence[Floats] | None,
    spec: LossSpec,
    losses: Callable[[str], LossFn],
    kls: Callable[[str], KlFn],
) -> Taken:
    """`logprobs` and `reference` have shape [T] for each sample.

    Raises EngineError, naming the sample, for a loss or a gradient that is not finite.
    """
    current_N = torch.from_numpy(_flat(logprobs, samples)).requires_grad_()
    reference_N = None if reference is None else torch.from_numpy(_flat(reference, samples))
    segments_N = np.repeat(np.arange(len(samples)), [s.num_trained for s in samples])
    inputs = loss_input(current_N, reference_N, segments_N, samples)
    loss, metrics = loss_of(inputs, spec, losses, kls)
    value = float(loss.detach())
    (gradient_N,) = torch.autograd.grad(loss, current_N)
    if not math.isfinite(value) or not bool(gradient_N.isfinite().all()):
        raise non_finite(value, inputs, samples, spec)
    means = TokenMeans()
    means.add(metrics | sampler_gap(inputs))
    return Taken(value, means.result(), _spread(gradient_N.numpy(), samples))


def check_ready(samples: Sequence[Sample]) -> None:
    """Raises EngineError unless the trainer has set advantages and weights."""
    for sample in samples:
        if sample.advantages is None or sample.weights is None:
            raise EngineError(
                f"Sample {sample.sample_id!r} has no advantages or no weights: the trainer must "
                "set them before forward_backward."
            )


def _flat(values: Sequence[Floats], samples: Sequence[Sample]) -> Floats:
    return np.concatenate(
        [v[s.loss_mask] for v, s in zip(values, samples, strict=True)], dtype=np.float32
    )


def _spread(values_N: Floats, samples: Sequence[Sample]) -> tuple[Floats, ...]:
    spread: list[Floats] = []
    start = 0
    for sample in samples:
        values_T = np.zeros(len(sample.token_ids), np.float32)
        values_T[sample.loss_mask] = values_N[start : start + sample.num_trained]
        start += sample.num_trained
        spread.append(values_T)
    return tuple(spread)
