"""Our losses as losses of the Tinker API, with the same gradient.

A service computes sum_t g_t * grad log pi_t; what differs between losses is g. So:
(1) where the API has the loss itself, its row weights are folded into the advantages;
(2) with one optimizer step a batch the proximal policy is the trained one, and every
    ratio loss has the gradient of `cispo` on the behaviour logprobs, cut at tis_cap;
(3) anything else makes a forward pass first, takes dL/dlogpi here with the very functions
    that `local` uses, and sends it as the (negative) weights of `cross_entropy`.
The loss value and the metrics are computed here from the logprobs that come back, in all
three. Folding is exact but for the rounding of one float32 product. No SDK in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from astuner.engine.protocol import LossSpec
from astuner.types import Sample

if TYPE_CHECKING:
    from astuner.config.schema import AstunerConfig

Floats = NDArray[np.float32]

RATIO_LOSSES = ("ppo", "importance_sampling", "gspo", "cispo")
"""All have the ratio 1, and clip nothing, while trained and proximal weights are the same."""
CLIPPED = ("ppo", "cispo")
_CLIPS: Mapping[str, tuple[float, float]] = {"ppo": (0.2, 0.2), "cispo": (1.0, 0.2)}
"""The clip ranges of our own losses where the configuration leaves them open."""


@dataclass(frozen=True, eq=False)
class Remote:
    """A loss of the API, and what its datums hold: arrays [T] for each sample."""

    loss: str
    inputs: Mapping[str, Sequence[Floats]]
    config: Mapping[str, float] = field(default_factory=dict[str, float])


def remote_loss(samples: Sequence[Sample], spec: LossSpec) -> Remote | None:
    """The API's loss with the gradient of ours on these samples; None if a forward pass
    must come first."""
    if spec.kl_coef > 0:
        return None
    if spec.name == "cross_entropy":
        return Remote("cross_entropy", {"weights": [_weights(s) for s in samples]})
    if spec.name == "policy_gradient":
        return Remote("cross_entropy", {"weights": [_folded(s) for s in samples]})
    if spec.name not in RATIO_LOSSES:
        return None
    cap = spec.params.get("tis_cap", 0.0)
    proximal = all(s.proximal_logprobs is not None for s in samples)
    if cap > 0 and not proximal:
        return _on_policy(samples, cap)
    if spec.name == "gspo" or spec.params.get("dual_clip", 0.0) > 0:
        return None
    if cap > 0:
        return _native(spec, [_proximal(s) for s in samples], [_corrected(s, cap) for s in samples])
    return _native(spec, [s.logprobs for s in samples], [_folded(s) for s in samples])


def needs_forward_first(config: AstunerConfig) -> str | None:
    """Why the updates of this configuration cannot do with one pass; None if they can."""
    trainer = config.trainer_common
    name, cap = trainer.algorithm.loss, trainer.algorithm.tis_cap
    if trainer.use_kl_loss and trainer.kl_loss_coef > 0:
        return "the API has no KL term, so its gradient is computed here"
    if name in ("cross_entropy", "policy_gradient"):
        return None
    if name in RATIO_LOSSES and cap > 0 and trainer.mini_batch_num == 1:
        return None
    if name in ("ppo", "importance_sampling", "cispo"):
        return None
    return f"the API does not have the loss {name} as it is here, so its gradient is computed here"


def _on_policy(samples: Sequence[Sample], cap: float) -> Remote:
    return Remote(
        "cispo",
        {"logprobs": [s.logprobs for s in samples], "advantages": [_folded(s) for s in samples]},
        {"clip_low_threshold": 0.0, "clip_high_threshold": cap},
    )


def _native(spec: LossSpec, logprobs: Sequence[Floats], advantages: Sequence[Floats]) -> Remote:
    config: dict[str, float] = {}
    if spec.name in CLIPPED:
        low, high = _CLIPS[spec.name]
        config["clip_low_threshold"] = 1 - spec.params.get("clip_low", low)
        config["clip_high_threshold"] = 1 + spec.params.get("clip_high", high)
    return Remote(spec.name, {"logprobs": logprobs, "advantages": advantages}, config)


def _weights(sample: Sample) -> Floats:
    assert sample.weights is not None  # checked before any loss is taken
    return np.where(sample.loss_mask, sample.weights, 0).astype(np.float32)


def _folded(sample: Sample) -> Floats:
    assert sample.advantages is not None
    return (_weights(sample) * sample.advantages).astype(np.float32)


def _proximal(sample: Sample) -> Floats:
    assert sample.proximal_logprobs is not None
    return sample.proximal_logprobs


def _corrected(sample: Sample, cap: float) -> Floats:
    """Advantages with row weights and truncated importance weights folded in."""
    gap = np.clip(_proximal(sample) - sample.logprobs, -20, 20)
    return (_folded(sample) * np.minimum(np.exp(gap), cap)).astype(np.float32)
