"""One step's optimizer updates on a policy: proximal logprobs, gradients, steps.

Each mini-batch is one optimizer step. With several, the logprobs under the weights at
the start of the step are computed first, for they are what later ratios refer to;
with one, they are what the forward pass computes anyway.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from astuner.engine.protocol import AdamParams, ForwardBackwardResult, LossSpec, Policy
from astuner.types import Sample

COUNTS = ("packed_tokens", "sample_tokens", "trained_tokens", "micro_batches")
"""Metrics of a policy that are counts, summed over mini-batches; others are means."""


@dataclass(frozen=True, slots=True)
class Update:
    loss: float
    """Mean over the mini-batches."""
    grad_norm: float
    """Before clipping; mean over the mini-batches."""
    lr: float
    logprobs: tuple[NDArray[np.float32], ...]
    """Of each sample, in the batch's order, under the weights at the start of the step."""
    metrics: Mapping[str, float]


async def update_policy(
    policy: Policy,
    batches: Sequence[Sequence[Sample]],
    loss: LossSpec,
    adam: AdamParams,
    *,
    before_step: Callable[[], None],
) -> Update:
    """Train on the mini-batches in order; `before_step` is called before weights change.

    Raises EngineError on a loss that is not finite.
    """
    proximal: tuple[NDArray[np.float32], ...] | None = None
    if len(batches) > 1:
        everything = [s for batch in batches for s in batch]
        proximal = await policy.forward(everything, temperature=loss.temperature)
        batches = _with_proximal(batches, proximal)
    results: list[ForwardBackwardResult] = []
    steps: list[dict[str, float]] = []
    for batch in batches:
        results.append(await policy.forward_backward(batch, loss))
        before_step()
        steps.append(await policy.optim_step(adam))
    return Update(
        loss=float(np.mean([r.loss for r in results])),
        grad_norm=float(np.mean([s["grad_norm"] for s in steps])),
        lr=steps[-1].get("lr", adam.lr),
        logprobs=results[0].logprobs if proximal is None else proximal,
        metrics=_merged(results, [sum(s.num_trained for s in b) for b in batches])
        | _of_adapters(steps),
    )


def _with_proximal(
    batches: Sequence[Sequence[Sample]], logprobs: Sequence[NDArray[np.float32]]
) -> list[list[Sample]]:
    of_sample = iter(logprobs)
    return [[replace(s, proximal_logprobs=next(of_sample)) for s in batch] for batch in batches]


def _merged(results: Sequence[ForwardBackwardResult], tokens: Sequence[int]) -> dict[str, float]:
    """Counts are summed; all else is averaged over trained tokens."""
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for r in results for name in r.metrics):
        measured = [
            (r.metrics[name], n) for r, n in zip(results, tokens, strict=True) if name in r.metrics
        ]
        values = [value for value, _ in measured]
        if name.rpartition("/")[2] in COUNTS:
            merged[name] = float(sum(values))
        else:
            merged[name] = float(np.average(values, weights=[n for _, n in measured]))
    return merged


def _of_adapters(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the steps say of single adapters, as NAME/...; means over those that say it."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in ((n, v) for step in steps for n, v in step.items() if "/" in n):
        values[name].append(value)
    return {name: float(np.mean(v)) for name, v in values.items()}
