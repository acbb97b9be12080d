"""What verl loads into each of its processes (`VERL_USE_EXTERNAL_MODULES`): the advantage
estimator "astuner".

Advantages are credited where a whole group is seen, in the agent loop (`outputs`), and
travel as token-level scores. This estimator passes them through; it computes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo.core_algos import (  # pyright: ignore[reportMissingImports]
    register_adv_est,
)

from astuner.backbone.verl.sections import ESTIMATOR


@register_adv_est(ESTIMATOR)  # pyright: ignore[reportUntypedFunctionDecorator]
def pass_through(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns [B, T]: the scores where the mask is 1, else 0."""
    advantages_BT = token_level_rewards * response_mask
    return advantages_BT, advantages_BT
