"""Losses by hand: values, gradients, and where a clip stops them."""

from __future__ import annotations

import math

import pytest
import torch

from astuner.algorithm import LOSSES, accepted, find_loss
from astuner.algorithm.losses import (
    cispo,
    cross_entropy,
    dro,
    gspo,
    importance_sampling,
    policy_gradient,
    ppo,
)
from astuner.engine.protocol import LossInput


def inputs(
    ratios: list[float],
    advantages: list[float],
    *,
    behind: list[float] | None = None,
    segments: list[int] | None = None,
    weights: list[float] | None = None,
) -> LossInput:
    """Tokens whose trained / proximal is `ratios` and proximal / behaviour is `behind`."""
    proximal = torch.full((len(ratios),), -2.0)
    return LossInput(
        logprobs=(proximal + torch.tensor(ratios).log()).requires_grad_(),
        behaviour_logprobs=proximal - torch.tensor(behind or [1.0] * len(ratios)).log(),
        proximal_logprobs=proximal,
        reference_logprobs=None,
        advantages=torch.tensor(advantages),
        weights=torch.tensor(weights or [1.0] * len(ratios)),
        segments=torch.tensor(segments or [0] * len(ratios)),
        num_segments=max(segments or [0]) + 1,
    )


def gradient(batch: LossInput, loss: torch.Tensor) -> list[float]:
    loss.backward()
    assert batch.logprobs.grad is not None
    return batch.logprobs.grad.tolist()


def test_ppo_clips_only_what_would_go_further() -> None:
    batch = inputs([1.5, 0.5, 1.5, 0.5, 1.1], [1.0, 1.0, -1.0, -1.0, 2.0])
    out = ppo(batch, clip_low=0.2, clip_high=0.2)
    # min(rA, clip(r)A): 1.2, 0.5, -1.5, -0.8, 2.2
    assert out.loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.2), rel=1e-5)
    assert gradient(batch, out.loss) == pytest.approx([0, -0.5, 1.5, 0, -2.2], rel=1e-5)
    assert out.metrics["clipped_high"].tolist() == [1, 0, 0, 0, 0]
    assert out.metrics["clipped_low"].tolist() == [0, 0, 0, 1, 0]
    assert out.metrics["ratio"].tolist() == pytest.approx([1.5, 0.5, 1.5, 0.5, 1.1])


def test_clip_higher_leaves_room_above() -> None:
    batch = inputs([1.25], [1.0])
    out = ppo(batch, clip_low=0.2, clip_high=0.28)
    assert out.loss.item() == pytest.approx(-1.25)
    assert gradient(batch, out.loss) == pytest.approx([-1.25])


def test_dual_clip_bounds_a_negative_advantage() -> None:
    batch = inputs([5.0, 2.0, 5.0], [-1.0, -1.0, 1.0])
    out = ppo(batch, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    # -(-3), -(-2), -(1.2)
    assert out.loss.item() == pytest.approx(3 + 2 - 1.2, rel=1e-5)
    assert gradient(batch, out.loss) == pytest.approx([0, 2, 0], rel=1e-5)
    assert out.metrics["dual_clipped"].tolist() == [1, 0, 0]


def test_weights_multiply_each_token() -> None:
    batch = inputs([1.0, 1.0], [1.0, 1.0], weights=[0.25, 0.0])
    out = ppo(batch)
    assert out.loss.item() == pytest.approx(-0.25)
    assert gradient(batch, out.loss) == pytest.approx([-0.25, 0])


def test_without_a_cap_the_ratio_is_against_the_sampler() -> None:
    # trained / proximal 1.1, proximal / behaviour 1.5: the classic ratio is 1.65
    batch = inputs([1.1], [1.0], behind=[1.5])
    out = ppo(batch, tis_cap=0.0)
    assert out.metrics["ratio"].tolist() == pytest.approx([1.65])
    assert out.loss.item() == pytest.approx(-1.2)
    assert gradient(batch, out.loss) == [0.0]
    assert "tis_weight" not in out.metrics


def test_with_a_cap_the_gap_to_the_sampler_is_a_truncated_weight() -> None:
    batch = inputs([1.1, 1.1], [1.0, 1.0], behind=[1.5, 9.0])
    out = ppo(batch, tis_cap=2.0)
    assert out.loss.item() == pytest.approx(-1.1 * (1.5 + 2.0), rel=1e-5)
    assert gradient(batch, out.loss) == pytest.approx([-1.65, -2.2], rel=1e-5)
    assert out.metrics["tis_weight"].tolist() == pytest.approx([1.5, 2.0])
    assert out.metrics["tis_truncated"].tolist() == [0, 1]


def test_one_step_per_batch_is_a_weighted_policy_gradient() -> None:
    """proximal == logprobs.detach(): no clip can act, the gradient is -w A tis grad log pi."""
    batch = inputs([1.0, 1.0], [2.0, -3.0], behind=[0.5, 4.0])
    out = ppo(batch, tis_cap=2.0)
    assert gradient(batch, out.loss) == pytest.approx([-2 * 0.5, 3 * 2.0], rel=1e-5)
    assert out.metrics["clipped_low"].sum() + out.metrics["clipped_high"].sum() == 0


def test_the_weight_carries_no_gradient_even_if_proximal_is_the_live_tensor() -> None:
    live = torch.tensor([-1.0], requires_grad=True)
    one = torch.ones(1)
    batch = LossInput(live, torch.tensor([-1.5]), live, None, one, one, torch.tensor([0]), 1)
    loss = ppo(batch, tis_cap=10.0).loss
    assert gradient(batch, loss) == pytest.approx([-math.exp(0.5)])


def test_importance_sampling_is_never_clipped() -> None:
    batch = inputs([3.0, 0.1], [1.0, -1.0])
    out = importance_sampling(batch)
    assert out.loss.item() == pytest.approx(-2.9, rel=1e-5)
    assert gradient(batch, out.loss) == pytest.approx([-3.0, 0.1], rel=1e-5)


def test_gspo_ratio_is_the_geometric_mean_of_the_sequence() -> None:
    # sequence 0: sqrt(4 * 1) = 2; sequence 1: cube root of 8 * 1 * 1 = 2
    batch = inputs(
        [4.0, 1.0, 8.0, 1.0, 1.0],
        [1.0, 1.0, -1.0, -1.0, -1.0],
        segments=[0, 0, 1, 1, 1],
        weights=[0.5, 0.5, 1 / 3, 1 / 3, 1 / 3],
    )
    out = gspo(batch, clip_low=2.0, clip_high=2.0)
    assert out.metrics["ratio"].tolist() == pytest.approx([2.0] * 5, rel=1e-5)
    assert out.loss.item() == pytest.approx(-2 + 2, abs=1e-5)
    # s A / |y| for each token
    assert gradient(batch, out.loss) == pytest.approx([-1, -1, 2 / 3, 2 / 3, 2 / 3], rel=1e-5)


def test_gspo_clips_whole_sequences() -> None:
    batch = inputs([1.4, 1.0, 1.0], [1.0, 1.0, 1.0], segments=[0, 0, 1])
    out = gspo(batch, clip_low=0.1, clip_high=0.1)  # sqrt(1.4) = 1.183
    assert gradient(batch, out.loss) == pytest.approx([0, 0, -1])
    assert out.metrics["clipped_high"].tolist() == [1, 1, 0]
    assert out.loss.item() == pytest.approx(-(1.1 + 1.1 + 1.0), rel=1e-5)


def test_gspo_equals_the_gradient_of_the_plain_sequence_form() -> None:
    """Equation 5 written out: mean over tokens of log-ratios, exp, times A."""
    batch = inputs([1.3, 0.8, 1.1], [0.7] * 3, weights=[1 / 3] * 3)
    token_form = gradient(batch, gspo(batch, clip_low=1.0, clip_high=1.0).loss)
    x = batch.logprobs.detach().clone().requires_grad_()
    (-(x - batch.behaviour_logprobs).mean().exp() * 0.7).backward()
    assert x.grad is not None
    assert token_form == pytest.approx(x.grad.tolist(), rel=1e-5)


def test_cispo_clips_the_weight_and_keeps_the_gradient() -> None:
    batch = inputs([3.0, 0.5, 3.0], [1.0, 1.0, -1.0])
    out = cispo(batch, clip_low=1.0, clip_high=0.2)
    assert gradient(batch, out.loss) == pytest.approx([-1.2, -0.5, 1.2], rel=1e-5)
    assert out.metrics["clipped_high"].tolist() == [1, 0, 1]
    value = -(1.2 * math.log(3) - 1.2 * math.log(3) + 0.5 * math.log(0.5)) - (1.2 - 1.2 + 0.5) * -2
    assert out.loss.item() == pytest.approx(value, rel=1e-5)


def test_gspo_counts_only_tokens_with_a_weight() -> None:
    batch = inputs([4.0, 1.0, 50.0], [1.0, 1.0, 1.0], weights=[0.5, 0.5, 0.0])
    out = gspo(batch, clip_low=2.0, clip_high=2.0)  # sqrt(4 * 1), as without the third
    assert out.metrics["ratio"].tolist() == pytest.approx([2.0] * 3, rel=1e-5)
    assert gradient(batch, out.loss) == pytest.approx([-1, -1, 0], rel=1e-5)


def test_cispo_with_other_bounds_around_zero() -> None:
    """Bounds 0 and 4 of the weight itself, as the Tinker API has them."""
    batch = inputs([6.0, 0.1], [1.0, 1.0])
    out = cispo(batch, clip_low=1.0, clip_high=3.0)
    assert gradient(batch, out.loss) == pytest.approx([-4.0, -0.1], rel=1e-5)


def test_dro_by_hand() -> None:
    # log r = log 2 and log 0.5; logprobs -2 + log r
    batch = inputs([2.0, 0.5], [1.5, -1.0])
    out = dro(batch, beta=0.1)
    ln2 = math.log(2)
    value = -1.5 * (-2 + ln2) + 1.0 * (-2 - ln2) + 2 * 0.05 * ln2**2
    assert out.loss.item() == pytest.approx(value, rel=1e-5)
    assert gradient(batch, out.loss) == pytest.approx([-1.5 + 0.1 * ln2, 1 - 0.1 * ln2], rel=1e-5)
    assert out.metrics["ratio"].tolist() == pytest.approx([2.0, 0.5])


def test_policy_gradient_knows_no_ratio() -> None:
    batch = inputs([3.0, 1.0], [2.0, -1.0], behind=[5.0, 5.0])
    assert gradient(batch, policy_gradient(batch).loss) == pytest.approx([-2, 1])


def test_cross_entropy_knows_no_advantage() -> None:
    batch = inputs([1.0, 1.0], [0.0, -5.0], weights=[0.5, 0.5])
    out = cross_entropy(batch)
    assert out.loss.item() == pytest.approx(2.0)
    assert gradient(batch, out.loss) == pytest.approx([-0.5, -0.5])
    away = inputs([1.0], [1.0], weights=[-2.0])
    assert gradient(away, cross_entropy(away).loss) == pytest.approx([2.0])


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"cross_entropy"}))
def test_every_loss_raises_what_was_rewarded(name: str) -> None:
    batch = inputs([1.0, 1.0], [1.0, -1.0], segments=[0, 1])
    up, down = gradient(batch, find_loss(name)(batch).loss)
    assert up < 0 < down  # a descent step raises the first logprob, lowers the second


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_stays_finite_far_off_policy(name: str) -> None:
    loss = find_loss(name)
    offered = {"clip_low": 0.2, "clip_high": 0.2, "tis_cap": 2.0, "unknown": 1.0}
    proximal = torch.tensor([-300.0, -0.1])
    one = torch.ones(2)
    batch = LossInput(
        torch.tensor([-0.1, -300.0], requires_grad=True),
        proximal.flip(0),
        proximal,
        None,
        one,
        one,
        torch.tensor([0, 1]),
        2,
    )
    out = loss(batch, **accepted(loss, offered))
    assert math.isfinite(out.loss.item())
    assert all(math.isfinite(g) for g in gradient(batch, out.loss))
    assert all(m.shape == (2,) and not m.requires_grad for m in out.metrics.values())
