"""KL estimators: values by hand, and gradients against the exact divergence."""

from __future__ import annotations

import math

import pytest
import torch

from astuner.algorithm import find_kl
from astuner.algorithm.kl import k1, k2, k3

TRAINED = torch.tensor([0.5, -1.0, 0.2])
REFERENCE = torch.tensor([0.0, 0.3, -0.4]).log_softmax(0)


def expected_gradient(estimator) -> torch.Tensor:
    """Of the mean of the estimator over all outcomes, drawn by the trained policy."""
    logits = TRAINED.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (logprobs.detach().exp() * estimator(logprobs, REFERENCE)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def exact_gradient(of_reverse: bool) -> torch.Tensor:
    logits = TRAINED.clone().requires_grad_()
    p, q = logits.log_softmax(0), REFERENCE
    kl = (p.exp() * (p - q)).sum() if of_reverse else (q.exp() * (q - p)).sum()
    kl.backward()
    assert logits.grad is not None
    return logits.grad


def test_values() -> None:
    trained, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.5])
    assert k1(trained, reference).tolist() == pytest.approx([1.0, -0.5])
    assert k2(trained, reference).tolist() == pytest.approx([0.5, 0.125])
    assert k3(trained, reference).tolist() == pytest.approx(
        [math.exp(-1) - 1 + 1, math.exp(0.5) - 1 - 0.5]
    )


def test_k1_and_k3_are_unbiased() -> None:
    logprobs = TRAINED.log_softmax(0)
    exact = (logprobs.exp() * (logprobs - REFERENCE)).sum()
    for estimator in (k1, k3):
        mean = (logprobs.exp() * estimator(logprobs, REFERENCE)).sum()
        assert mean.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("estimator", [k1, k2])
def test_k1_and_k2_have_the_gradient_of_the_reverse_kl(estimator) -> None:
    assert torch.allclose(expected_gradient(estimator), exact_gradient(True), atol=1e-6)


def test_k3_has_the_gradient_of_the_forward_kl() -> None:
    assert torch.allclose(expected_gradient(k3), exact_gradient(False), atol=1e-6)


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "low_var_kl"])
def test_nothing_at_the_reference_and_finite_far_away(name: str) -> None:
    estimator = find_kl(name)
    near = torch.tensor([-1.0], requires_grad=True)
    value = estimator(near, torch.tensor([-1.0]))
    value.sum().backward()
    assert value.item() == 0.0
    assert near.grad is not None and near.grad.item() == 0.0
    assert torch.isfinite(estimator(torch.tensor([-500.0]), torch.tensor([-0.1]))).all()


def test_the_reference_gets_no_gradient() -> None:
    reference = torch.tensor([-1.0], requires_grad=True)
    for estimator in (k1, k2, k3):
        estimator(torch.tensor([-2.0], requires_grad=True), reference).sum().backward()
    assert reference.grad is None
