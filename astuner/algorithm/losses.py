"""Policy losses over the flat trained tokens of one micro-batch.

Each is `(inputs: LossInput, **params) -> LossOutput` with loss = sum of weight *
token loss, so a micro-batch adds its part to the whole. KL terms are not here (see
`kl`), and neither is any division (see `aggregation`).

Three policies meet in a loss: the one being trained, the proximal one (the same
weights at the start of the step) and the behaviour that sampled. With tis_cap > 0
the ratio that is clipped is trained / proximal, and what lies between proximal and
behaviour (another kernel, staler weights) is a weight min(proximal / behaviour,
tis_cap) without gradient: truncated importance sampling (Yao et al. 2025, "Your
efficient RL framework secretly brings you off-policy RL training"), the decoupled
objective of Hilton et al. 2022 (arXiv 2110.00641). With tis_cap = 0 the ratio is
trained / behaviour, and there is no such weight: the classic form.

With one optimizer step a batch, proximal equals trained: the ratio is 1 with the
gradient of log pi, nothing is clipped, and the correction is all in the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from astuner.engine.protocol import LossInput, LossOutput

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before exp, so that no token makes the loss infinite."""


def ppo(
    inputs: LossInput,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
    tis_cap: float = 0.0,
) -> LossOutput:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    PPO (Schulman et al. 2017, arXiv 1707.06347), equation 7. clip_high > clip_low is
    DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476), equation 10. dual_clip > 1
    bounds the loss of a negative advantage at -dual_clip * A (Ye et al. 2020, arXiv
    1912.09729), equation 5; 0 switches it off.
    """
    log_ratio, tis = _log_ratio(inputs, tis_cap)
    ratio = log_ratio.exp()
    objective, metrics = _clipped(ratio, inputs.advantages, clip_low, clip_high)
    if dual_clip > 0:
        negative = inputs.advantages < 0
        floor = dual_clip * inputs.advantages
        metrics["dual_clipped"] = _share(negative & (objective < floor))
        objective = torch.where(negative, torch.maximum(objective, floor), objective)
    return _output(inputs, -objective * tis, metrics | _ratio_metrics(ratio, tis, tis_cap))


def importance_sampling(inputs: LossInput, *, tis_cap: float = 0.0) -> LossOutput:
    """-r A, the ratio unclipped: the gradient is that of the reward under the trained policy.

    The surrogate of TRPO (Schulman et al. 2015, arXiv 1502.05477), equation 14, and the
    `importance_sampling` loss of the Tinker API.
    """
    log_ratio, tis = _log_ratio(inputs, tis_cap)
    ratio = log_ratio.exp()
    return _output(inputs, -ratio * inputs.advantages * tis, _ratio_metrics(ratio, tis, tis_cap))


def gspo(
    inputs: LossInput,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    tis_cap: float = 0.0,
) -> LossOutput:
    """PPO's clipped objective with one ratio for each sequence, the geometric mean of its tokens'.

    GSPO (Zheng et al. 2025, arXiv 2507.18071), equation 7 for the ratio s, in the form of
    equations 13 and 14 (GSPO-token): a token's value is s, its gradient that of its own
    log pi. With one advantage a sequence both forms have the same value and gradient. A
    sequence is those tokens of a sample that have a weight. Clip ranges are of the order
    1e-4, far below PPO's.
    """
    log_ratio, tis = _log_ratio(inputs, tis_cap)
    sequence = _segment_mean(log_ratio.detach(), inputs)
    ratio = (sequence + log_ratio - log_ratio.detach()).exp()
    objective, metrics = _clipped(ratio, inputs.advantages, clip_low, clip_high)
    return _output(inputs, -objective * tis, metrics | _ratio_metrics(ratio, tis, tis_cap))


def cispo(
    inputs: LossInput,
    *,
    clip_low: float = 1.0,
    clip_high: float = 0.2,
    tis_cap: float = 0.0,
) -> LossOutput:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi: clips the weight, never the gradient.

    CISPO (MiniMax 2025, arXiv 2506.13585), equations 4 and 5; the paper sets no lower
    bound, which is clip_low = 1.
    """
    log_ratio, tis = _log_ratio(inputs, tis_cap)
    ratio = log_ratio.exp().detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    metrics = {
        "clipped_low": _share(ratio < 1 - clip_low),
        "clipped_high": _share(ratio > 1 + clip_high),
    }
    token_loss = -weight * inputs.advantages * tis * inputs.logprobs
    return _output(inputs, token_loss, metrics | _ratio_metrics(ratio, tis, tis_cap))


def dro(inputs: LossInput, *, beta: float = 0.05) -> LossOutput:
    """-(A log pi - beta / 2 (log r)^2): off-policy, held to the sampler by a square.

    DRO (Richemond et al. 2024, arXiv 2405.19107), in the per-token form of Kimi k1.5 (Kimi
    Team 2025, arXiv 2501.12599), equation 3, and of the Tinker API. The advantage is meant
    to be soft: the reward minus a value estimate, not divided by a deviation.
    """
    log_ratio = inputs.logprobs - inputs.behaviour_logprobs
    token_loss = 0.5 * beta * log_ratio**2 - inputs.advantages * inputs.logprobs
    return _output(inputs, token_loss, _ratio_metrics(_bounded(log_ratio).exp(), log_ratio, 0.0))


def policy_gradient(inputs: LossInput) -> LossOutput:
    """-A log pi, as if the tokens came from the weights being trained.

    REINFORCE (Williams 1992), equation 4 in expectation. No correction of any kind.
    """
    return _output(inputs, -inputs.advantages * inputs.logprobs, {})


def cross_entropy(inputs: LossInput) -> LossOutput:
    """-log pi: imitate the tokens; advantages are not read."""
    return _output(inputs, -inputs.logprobs, {})


# ---------------------------------------------------------------- the arithmetic


def _log_ratio(inputs: LossInput, tis_cap: float) -> tuple[Tensor, Tensor]:
    """The log of the ratio with the gradient, and the weight [N] without one."""
    if tis_cap > 0:
        gap = _bounded(inputs.proximal_logprobs - inputs.behaviour_logprobs)
        old, tis = inputs.proximal_logprobs, gap.exp().clamp(max=tis_cap).detach()
    else:
        old, tis = inputs.behaviour_logprobs, torch.ones_like(inputs.advantages)
    return _bounded(inputs.logprobs - old.detach()), tis


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clipped(
    ratio: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """min(r A, clip(r) A), and where the clip stops the gradient."""
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return objective, {
        "clipped_low": _share((ratio < 1 - low) & (advantages < 0)),
        "clipped_high": _share((ratio > 1 + high) & (advantages > 0)),
    }


def _segment_mean(values: Tensor, inputs: LossInput) -> Tensor:
    """For each token, the mean of `values` over the tokens of its segment that have a weight."""
    counted = (inputs.weights != 0).to(values.dtype)
    zeros = values.new_zeros(inputs.num_segments)
    sums = zeros.index_add(0, inputs.segments, values * counted)
    counts = zeros.index_add(0, inputs.segments, counted)
    return (sums / counts.clamp(min=1))[inputs.segments]


def _ratio_metrics(ratio: Tensor, tis: Tensor, tis_cap: float) -> dict[str, Tensor]:
    metrics = {"ratio": ratio.detach()}
    if tis_cap > 0:
        metrics |= {"tis_weight": tis, "tis_truncated": _share(tis >= tis_cap)}
    return metrics


def _share(condition: Tensor) -> Tensor:
    return condition.float()


def _output(inputs: LossInput, token_loss: Tensor, metrics: dict[str, Tensor]) -> LossOutput:
    return LossOutput((inputs.weights * token_loss).sum(), metrics)
