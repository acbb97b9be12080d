"""Per-token estimators of KL(trained || reference), made to be used as a loss.

`k(logprobs, reference_logprobs) -> [N]`, differentiable in `logprobs`, from tokens
drawn by the trained policy. Values are those of Schulman 2020, "Approximating KL
divergence" (joschu.net/blog/kl-approx.html), with log r = reference - trained.

A good estimate of a value need not have a good gradient (Tang and Munos 2025, arXiv
2506.09477): the gradient of k1 as it stands is zero in expectation; that of k2 is
exactly the reverse KL's; that of k3, the choice of GRPO, is the forward KL's
(KL(reference || trained)), which also pulls to the reference. So k1 here has the
value of k1 and the gradient of k2.
"""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here, so that exp stays finite."""


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """trained - reference: unbiased, may be negative. Gradient of `k2`."""
    squared = k2(logprobs, reference_logprobs)
    return squared + (-_log_r(logprobs, reference_logprobs) - squared).detach()


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log r)^2 / 2: biased value, gradient (trained - reference) * grad log pi."""
    return _log_r(logprobs, reference_logprobs).square() / 2


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """r - 1 - log r: unbiased, never negative, of low variance.

    GRPO's choice (DeepSeekMath, Shao et al. 2024, equation 4); gradient (1 - r) * grad
    log pi.
    """
    log_r = _log_r(logprobs, reference_logprobs)
    return log_r.exp() - 1 - log_r


def _log_r(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    return (reference_logprobs.detach() - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
