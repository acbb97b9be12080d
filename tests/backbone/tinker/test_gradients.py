"""Every loss becomes losses of the API with the same gradient, number by number, without a service.

`api_gradient` is the API's own arithmetic on what `remote_loss` sends: the reference is the
gradient of our loss by autograd.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from astuner.algorithm import find_kl, find_loss
from astuner.backbone.tinker.gradients import Remote, remote_loss
from astuner.backbone.tinker.loss_here import check_ready, take_loss
from astuner.engine.protocol import LossSpec
from astuner.errors import EngineError
from astuner.types import Sample

Floats = Any


def sample(number: int, length: int, *, proximal: bool) -> Sample:
    random = np.random.default_rng(number)
    places = np.arange(length)
    mask = (places >= 2) & (places != 4)  # a tool's reply in the middle

    def values(low: float, high: float) -> Floats:
        return np.where(mask, random.uniform(low, high, length), 0).astype(np.float32)

    return Sample(
        sample_id=f"s{number}",
        episode_id=f"e{number}",
        group_id="g",
        task_id="t",
        agent_name="a",
        target_tag="x",
        token_ids=random.integers(3, 90, length).astype(np.int32),
        loss_mask=mask,
        logprobs=values(-3, -0.1),
        advantages=values(-2, 2),
        weights=values(0.01, 0.3),
        proximal_logprobs=values(-3, -0.1) if proximal else None,
    )


def samples(*, proximal: bool) -> list[Sample]:
    return [sample(i, 7 + i, proximal=proximal) for i in range(3)]


def current(of: list[Sample]) -> list[Floats]:
    random = np.random.default_rng(9)
    return [
        np.where(s.loss_mask, random.uniform(-3, -0.1, len(s.token_ids)), 0).astype(np.float32)
        for s in of
    ]


def api_gradient(remote: Remote, logprobs: list[Floats]) -> list[Floats]:
    """dL/dlogpi by the API's documented formulas."""
    found: list[Floats] = []
    for i, values in enumerate(logprobs):
        logp = torch.from_numpy(values).requires_grad_()
        given = {name: torch.from_numpy(np.asarray(v[i])) for name, v in remote.inputs.items()}
        low = remote.config.get("clip_low_threshold", 0.8)
        high = remote.config.get("clip_high_threshold", 1.2)
        if remote.loss == "cross_entropy":
            loss = -(given["weights"] * logp).sum()
        else:
            ratio, advantages = (logp - given["logprobs"]).exp(), given["advantages"]
            if remote.loss == "cispo":
                loss = -(ratio.detach().clamp(low, high) * advantages * logp).sum()
            elif remote.loss == "ppo":
                clipped = ratio.clamp(low, high) * advantages
                loss = -torch.minimum(ratio * advantages, clipped).sum()
            else:
                loss = -(ratio * advantages).sum()
        loss.backward()
        assert logp.grad is not None
        found.append(logp.grad.numpy())
    return found


@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("cap", [0.0, 1.3, 2.0])
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("ppo", {}),
        ("ppo", {"clip_low": 0.1, "clip_high": 0.28}),
        ("importance_sampling", {}),
        ("cispo", {}),
        ("cispo", {"clip_low": 0.5, "clip_high": 0.1}),
        ("gspo", {}),
        ("policy_gradient", {}),
        ("cross_entropy", {}),
    ],
)
def test_the_gradient_is_that_of_our_loss(
    name: str, params: dict[str, float], cap: float, proximal: bool
) -> None:
    given = samples(proximal=proximal)
    if name not in ("policy_gradient", "cross_entropy"):
        params = params | {"tis_cap": cap}
    spec = LossSpec(name, params)
    remote = remote_loss(given, spec)
    if name == "gspo" and (proximal or cap == 0):
        assert remote is None
        return
    assert remote is not None
    logprobs = current(given)
    ours = take_loss(given, logprobs, None, spec, find_loss, find_kl).gradient
    for mine, theirs in zip(ours, api_gradient(remote, logprobs), strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(
    "spec",
    [
        LossSpec("dro", {"beta": 0.1}),
        LossSpec("ppo", {"dual_clip": 3.0}),
        LossSpec("ppo", {"tis_cap": 2.0}, kl_coef=0.1),
        LossSpec("tests.my->loss"),
    ],
)
def test_what_needs_a_forward_pass_first(spec: LossSpec) -> None:
    assert remote_loss(samples(proximal=False), spec) is None


def test_loss_metrics_and_gradient_by_hand() -> None:
    """Two trained tokens; importance sampling: -w r A, and its gradient is the same."""
    two = replace(
        sample(0, 3, proximal=False),
        loss_mask=np.array([False, True, True]),
        logprobs=np.array([0, -1.0, -2.0], np.float32),
        advantages=np.array([0, 1.0, -2.0], np.float32),
        weights=np.array([0, 0.5, 0.25], np.float32),
    )
    now = np.array([0, -1.0, -1.0], np.float32)
    taken = take_loss([two], [now], None, LossSpec("importance_sampling"), find_loss, find_kl)
    e = float(np.e)
    assert taken.loss == pytest.approx(-0.5 + 0.5 * e)
    np.testing.assert_allclose(taken.gradient[0], [0, -0.5, 0.5 * e], rtol=1e-6)
    assert taken.metrics["ratio"] == pytest.approx((1 + e) / 2)
    assert taken.metrics["sampler_kl"] == pytest.approx((e - 2) / 2)


def test_a_kl_term_is_part_of_it() -> None:
    one = [sample(0, 7, proximal=False)]
    logprobs, reference = current(one), [np.full(7, -1.0, np.float32)]
    spec = LossSpec("policy_gradient", kl_coef=0.5, kl_type="k2")
    taken = take_loss(one, logprobs, reference, spec, find_loss, find_kl)
    plain = take_loss(one, logprobs, None, LossSpec("policy_gradient"), find_loss, find_kl)
    mask, weights = one[0].loss_mask, one[0].weights
    assert weights is not None
    expected = 0.5 * weights[mask] * (logprobs[0][mask] + 1.0)  # d/dlogp (logp - ref)^2 / 2
    np.testing.assert_allclose(
        (taken.gradient[0] - plain.gradient[0])[mask], expected, rtol=1e-5, atol=1e-7
    )


def test_what_is_not_finite_names_the_sample() -> None:
    given = samples(proximal=False)
    logprobs = current(given)
    logprobs[1][3] = np.nan
    with pytest.raises(EngineError, match=r"'s1'.*logprobs nan"):
        take_loss(given, logprobs, None, LossSpec("ppo"), find_loss, find_kl)
    with pytest.raises(EngineError, match="'s0' has no advantages or no weights"):
        check_ready([replace(given[0], weights=None)])
