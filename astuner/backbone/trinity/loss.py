"""Trinity's policy loss (`algorithm.policy_loss_fn`): astuner's own loss and KL functions.

Each token has a weight that holds every division there is (see `algorithm.aggregation`),
put on it by `batches` over the whole batch. So the loss of a part of a batch is a sum, and
that of the batch the sum of its parts. KL terms are part of it: Trinity's own are off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trinity.algorithm.policy_loss_fn.policy_loss_fn import (  # pyright: ignore[reportMissingImports]
    PolicyLossFn,
)

from astuner.algorithm import accepted, find_kl, find_loss
from astuner.engine.embedded.losses import loss_of, sampler_gap
from astuner.engine.protocol import LossInput, LossSpec


class PolicyLoss(PolicyLossFn):  # pyright: ignore[reportUntypedBaseClass]
    """Found by its dotted path. Tensors are [T], or [B, T] of a padded part of a batch."""

    def __init__(
        self,
        backend: str = "tinker",
        *,
        loss: str = "ppo",
        clip_low: float = -1.0,
        clip_high: float = -1.0,
        tis_cap: float = 0.0,
        kl_type: str = "",
        kl_coef: float = 0.0,
        processes: int = 1,
    ) -> None:
        """`processes` average their gradients, each of a part of the batch: the loss is
        multiplied by their number. Negative clip ranges are the loss's own defaults."""
        super().__init__(backend=backend)
        offered = {"clip_low": clip_low, "clip_high": clip_high}
        offered = {name: clip for name, clip in offered.items() if clip >= 0}
        self._spec = LossSpec(
            name=loss,
            params=accepted(find_loss(loss), offered | {"tis_cap": tis_cap}),
            kl_coef=kl_coef if kl_type else 0.0,
            kl_type=kl_type or "k3",
        )
        self._processes = processes

    def __call__(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        action_mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
        ref_logprob: Tensor | None = None,
        **kwargs: Any,  # by this name Trinity knows that it is no tensor to be handed over
    ) -> tuple[Tensor, dict[str, float]]:
        """The sum over trained tokens of weight times loss, and means over them. The weights
        are what Trinity calls `returns`, which it uses for nothing else here."""
        mask = action_mask.bool()
        has_kl = self._spec.kl_coef > 0 and ref_logprob is not None
        inputs = LossInput(
            logprobs=logprob[mask],
            behaviour_logprobs=old_logprob[mask],
            proximal_logprobs=logprob[mask].detach(),
            reference_logprobs=ref_logprob[mask] if has_kl and ref_logprob is not None else None,
            advantages=advantages[mask],
            weights=returns[mask],
            segments=_segments(mask),
            num_segments=mask.shape[0] if mask.dim() > 1 else 1,
        )
        loss, metrics = loss_of(inputs, self._spec, find_loss, find_kl)
        metrics |= sampler_gap(inputs)
        metrics["ppo_kl"] = (inputs.behaviour_logprobs - inputs.logprobs).detach()
        told = {name: _mean(value) for name, value in metrics.items()}
        return loss * self._processes, {**told, "pg_loss": loss.detach().item()}

    @classmethod
    def default_args(cls) -> dict[str, Any]:
        return {"loss": "ppo"}


def _segments(mask: Tensor) -> Tensor:
    """Which sequence each trained token is of, [N]."""
    if mask.dim() == 1:
        return torch.zeros(int(mask.sum()), dtype=torch.int64, device=mask.device)
    return mask.nonzero()[:, 0]


def _mean(values: Tensor) -> float:
    return values.float().mean().item() if values.numel() else 0.0
