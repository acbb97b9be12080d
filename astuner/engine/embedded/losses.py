"""From samples and logprobs to a loss: what a loss function is given, and what it gives back.

Shared by the embedded learner and by policies that compute their loss here and train
elsewhere. Which loss and KL functions there are is injected; no model and no pass here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from astuner.engine.protocol import LossFn, LossInput, LossSpec
from astuner.errors import EngineError
from astuner.types import Sample

KlFn = Callable[[Tensor, Tensor], Tensor]
"""`(logprobs, reference_logprobs) -> [N]`, differentiable in the first."""

Floats = NDArray[np.float32]


def loss_input(
    logprobs_N: Tensor,
    reference_N: Tensor | None,
    segments_N: NDArray[np.int64],
    samples: Sequence[Sample],
) -> LossInput:
    """What the loss function gets: the trained tokens of these samples, one after the other.
    `segments_N` says of which sample each is."""
    current = logprobs_N.detach().cpu().numpy()

    def flat(parts: Sequence[Floats | None]) -> Tensor:
        """One array [T] a sample to [N]; the current logprobs stand in where there is none."""
        values = [
            current[segments_N == k] if a is None else a[s.loss_mask]
            for k, (a, s) in enumerate(zip(parts, samples, strict=True))
        ]
        return torch.from_numpy(np.concatenate(values, dtype=np.float32)).to(logprobs_N.device)

    return LossInput(
        logprobs=logprobs_N,
        behaviour_logprobs=flat([s.logprobs for s in samples]),
        proximal_logprobs=flat([s.proximal_logprobs for s in samples]),
        reference_logprobs=reference_N,
        advantages=flat([s.advantages for s in samples]),
        weights=flat([s.weights for s in samples]),
        segments=torch.from_numpy(segments_N).to(logprobs_N.device),
        num_segments=len(samples),
    )


def loss_of(
    inputs: LossInput,
    spec: LossSpec,
    losses: Callable[[str], LossFn],
    kls: Callable[[str], KlFn],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with its KL term, and per-token metrics [N]."""
    output = losses(spec.name)(inputs, **spec.params)
    loss, metrics = output.loss, dict(output.metrics)
    if inputs.reference_logprobs is not None:
        kl_N = kls(spec.kl_type)(inputs.logprobs, inputs.reference_logprobs)
        loss = loss + spec.kl_coef * (inputs.weights * kl_N).sum()
        metrics["reference_kl"] = kl_N.detach()
    return loss, metrics


def sampler_gap(inputs: LossInput) -> dict[str, Tensor]:
    """How far the trainer's logprobs are from those the tokens were sampled with: their
    mean distance, and KL(sampler || trainer) by Schulman's k3."""
    gap_N = (inputs.logprobs.detach() - inputs.behaviour_logprobs).clamp(-20, 20)
    return {"logprob_gap": gap_N.abs(), "sampler_kl": gap_N.exp() - 1 - gap_N}


def non_finite(
    value: float, inputs: LossInput, samples: Sequence[Sample], spec: LossSpec
) -> EngineError:
    """What is wrong, naming the sample."""
    for name in ("behaviour_logprobs", "advantages", "weights", "logprobs", "reference_logprobs"):
        tensor: Tensor | None = getattr(inputs, name)
        if tensor is None or bool(tensor.isfinite().all()):
            continue
        bad = int((~tensor.isfinite()).nonzero()[0])
        sample, value_there = samples[int(inputs.segments[bad])], float(tensor.detach()[bad])
        return EngineError(
            f"The loss is {value}: sample {sample.sample_id!r} (episode {sample.episode_id!r}) "
            f"has {name} {value_there}. The gradient since the last step was "
            "dropped; leave the sample out or lower the learning rate."
        )
    names = [sample.sample_id for sample in samples]
    return EngineError(
        f"The loss function {spec.name!r} with {dict(spec.params)} gave {value} from finite "
        f"inputs, on the samples {names}. The gradient since the last step was dropped."
    )
