"""Gradients against plain transformers, signs by hand, steps, and what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from astuner.engine.embedded.learner import Learner
from astuner.engine.embedded.logprobs import token_logprobs
from astuner.engine.embedded.weights import LoraSpec
from astuner.engine.protocol import (
    AdamParams,
    ForwardBackwardResult,
    LossInput,
    LossOutput,
    LossSpec,
)
from astuner.errors import EngineError
from astuner.types import Sample

from .tiny import tiny_model
from .tiny_training import (
    drain,
    k3,
    learner,
    load_tiny,
    policy_gradient,
    sample,
    save_tiny,
    sequence_ratio,
    tokens,
    unpacked_gradients,
    unpacked_logprobs,
    with_advantage,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


def group() -> list[Sample]:
    """Eight answers to one prompt, two of them the same."""
    prompt = (tokens(1, 12), False)
    answers = [tokens(s, 3 + s % 4) for s in (2, 3, 4, 5, 6, 7, 8, 2)]
    return [sample(str(i), prompt, (a, True), seed=i) for i, a in enumerate(answers)]


def forked() -> list[Sample]:
    """An episode of three turns that forks after the first and the second."""
    start = [(tokens(1, 9), False), (tokens(2, 4), True), (tokens(3, 5), False)]
    shared = ([t for part, _ in start for t in part], False)
    return [
        sample("a", *start, (tokens(4, 6), True), (tokens(5, 3), False), (tokens(6, 2), True)),
        sample("b", shared, (tokens(7, 5), True), seed=1),
        sample("c", shared, (tokens(4, 6), False), (tokens(8, 7), True), seed=2),
    ]


def chain() -> list[Sample]:
    """Longer than one chunk of the attention."""
    return [sample("a", (tokens(1, 90), False), (tokens(2, 60), True), (tokens(3, 5), False))]


def norm_of_difference(
    mine: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> tuple[float, float]:
    assert mine.keys() == reference.keys()
    difference = sum((mine[n] - reference[n]).square().sum() for n in mine)
    return float(difference) ** 0.5, float(sum(g.square().sum() for g in reference.values())) ** 0.5


PG = LossSpec("pg", temperature=0.7)
SEQ = LossSpec("seq", {"power": 1.5})


@pytest.mark.parametrize(
    ("samples", "budget", "spec", "loss"),
    [
        pytest.param(group(), 4096, PG, policy_gradient, id="group"),
        pytest.param(group(), 20, PG, policy_gradient, id="group-split-over-rows"),
        pytest.param(group(), 20, SEQ, sequence_ratio, id="group-sequence-ratio"),
        pytest.param(forked(), 4096, PG, policy_gradient, id="forked"),
        pytest.param(forked(), 25, SEQ, sequence_ratio, id="forked-split"),
        pytest.param(chain(), 10, PG, policy_gradient, id="chain-beyond-the-budget"),
        pytest.param([*group(), *forked(), *chain()], 4096, PG, policy_gradient, id="all"),
    ],
)
def test_packed_gradients_are_those_of_one_sample_at_a_time(
    folder: Path,
    family: str,
    samples: Sequence[Sample],
    budget: int,
    spec: LossSpec,
    loss: Callable[..., LossOutput],
) -> None:
    mine = learner(load_tiny(folder, lora=None), budget)
    result = drain(mine.forward_backward(samples, spec))
    plain = tiny_model(family, attention="sdpa")
    difference, size = norm_of_difference(
        mine.masters.gradients(), unpacked_gradients(plain, samples, spec, loss)
    )
    assert size > 0.1
    assert difference < 1e-4 * size
    for item, logprobs in zip(samples, result.logprobs, strict=True):
        expected = unpacked_logprobs(plain, item, spec.temperature).detach().numpy()
        np.testing.assert_allclose(logprobs[item.loss_mask], expected, atol=2e-4)
        assert not logprobs[~item.loss_mask].any()


def test_adapter_gradients_are_peft_s(folder: Path, family: str, tmp_path: Path) -> None:
    samples, spec = group(), PG
    mine = learner(load_tiny(folder), 20)
    one_step(mine, samples)  # B is zero before it, and so is the gradient of A
    mine.save(tmp_path, optimizer=False)
    drain(mine.forward_backward(samples, spec))
    plain = PeftModel.from_pretrained(
        tiny_model(family, attention="sdpa"), str(tmp_path), is_trainable=True
    )
    reference = unpacked_gradients(plain, samples, spec, policy_gradient)
    renamed = {
        n.removeprefix("base_model.model.").replace(".default.", "."): g
        for n, g in reference.items()
    }
    difference, size = norm_of_difference(mine.masters.gradients(), renamed)
    assert size > 0.1
    assert difference < 1e-4 * size


def one_step(mine: Learner, samples: Sequence[Sample], lr: float = 1e-2) -> ForwardBackwardResult:
    result = drain(mine.forward_backward(samples, LossSpec("pg")))
    mine.optim_step(AdamParams(lr=lr))
    return result


@pytest.mark.parametrize(("advantage", "sign"), [(1.0, 1), (-1.0, -1)])
def test_a_positive_advantage_raises_the_logprob(llama: Path, advantage: float, sign: int) -> None:
    mine = learner(load_tiny(llama))
    samples = with_advantage([sample("a", (tokens(1, 5), False), (tokens(2, 4), True))], advantage)
    before = one_step(mine, samples, lr=1e-3).logprobs[0].sum()
    (after,) = drain(mine.forward(samples))
    assert sign * (after.sum() - before) > 0.01


def test_first_step_of_adamw_by_hand(llama: Path) -> None:
    """After one step from zero moments every B has moved by lr against its gradient's sign,
    and A, whose gradient is zero while B is, not at all."""
    mine = learner(load_tiny(llama))
    drain(mine.forward_backward(group(), LossSpec("pg")))
    before = {n: v.clone() for n, v in mine.masters.values().items()}
    gradients = {n: g.clone() for n, g in mine.masters.gradients().items()}
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    stats = mine.optim_step(AdamParams(lr=0.01, max_grad_norm=0.0))
    assert stats == {"grad_norm": pytest.approx(norm, rel=1e-5), "lr": 0.01, "skipped": 0.0}
    for name, value in mine.masters.values().items():
        moved = value - before[name]
        gradient = gradients[name]
        if "lora_A" in name:
            assert not gradient.any() and not moved.any()
        else:
            torch.testing.assert_close(moved, -0.01 * gradient / (gradient.abs() + 1e-8))


def test_clipping_scales_the_gradient_to_the_norm(llama: Path) -> None:
    """Adam's first moment after one step is (1 - beta1) times the clipped gradient."""
    mine = learner(load_tiny(llama))
    drain(mine.forward_backward(group(), LossSpec("pg")))
    stats = mine.optim_step(AdamParams(lr=0.0, betas=(0.5, 0.9), max_grad_norm=0.25))
    assert stats["grad_norm"] > 0.25
    assert float(mine.masters.moments()["exp_avg"].norm()) == pytest.approx(0.5 * 0.25, rel=1e-4)


def test_a_step_without_gradient_changes_nothing(llama: Path) -> None:
    mine = learner(load_tiny(llama))
    one_step(mine, group())
    before = {n: v.clone() for n, v in mine.masters.values().items()}
    drain(mine.forward_backward([], LossSpec("pg")))
    assert mine.optim_step(AdamParams(lr=1.0)) == {"grad_norm": 0.0, "lr": 1.0, "skipped": 1.0}
    assert all(torch.equal(v, before[n]) for n, v in mine.masters.values().items())


def test_gradients_add_up_over_calls(llama: Path) -> None:
    whole, parts = learner(load_tiny(llama)), learner(load_tiny(llama))
    samples = group()
    drain(whole.forward_backward(samples, PG))
    drain(parts.forward_backward(samples[:3], PG))
    drain(parts.forward_backward(samples[3:], PG))
    difference, size = norm_of_difference(parts.masters.gradients(), whole.masters.gradients())
    assert difference < 1e-4 * size


def test_recomputed_activations_give_the_same_gradient(llama: Path) -> None:
    for lora in (LoraSpec(rank=4, alpha=8), None):
        plain = learner(load_tiny(llama, lora=lora))
        weights = load_tiny(llama, lora=lora)
        saving = learner(weights, gradient_checkpointing=True)
        for mine in (plain, saving):
            drain(mine.forward_backward(group(), PG))
        difference, size = norm_of_difference(saving.masters.gradients(), plain.masters.gradients())
        assert difference < 1e-5 * size
        with weights.training() as model:
            assert sum(m.training for m in model.modules()) == 2  # the two layers alone
        with weights.sampling() as model:
            assert not any(m.training for m in model.modules())


def test_metrics_are_means_over_all_trained_tokens(llama: Path) -> None:
    samples = group()
    results = [
        drain(learner(load_tiny(llama), budget).forward_backward(samples, LossSpec("pg")))
        for budget in (4096, 20)
    ]
    one, many = (dict(r.metrics) for r in results)
    trained = sum(s.num_trained for s in samples)
    gap = np.concatenate(
        [(r - s.logprobs)[s.loss_mask] for r, s in zip(results[0].logprobs, samples, strict=True)]
    )
    assert one["logprob_gap"] == pytest.approx(np.abs(gap).mean(), rel=1e-4)
    assert one["sampler_kl"] == pytest.approx((np.exp(gap) - 1 - gap).mean(), rel=1e-4)
    assert one["trained_tokens"] == many["trained_tokens"] == trained
    assert one["sample_tokens"] == many["sample_tokens"] == sum(len(s.token_ids) for s in samples)
    assert one["packed_tokens"] == 12 + sum(s.num_trained - 1 for s in samples[:7])
    assert many["packed_tokens"] > one["packed_tokens"]
    assert (one["micro_batches"], many["micro_batches"] > 2) == (1, True)
    for name in ("logprob_gap", "sampler_kl", "entropy", "token_loss"):
        assert one[name] == pytest.approx(many[name], rel=1e-4)
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-4)


def test_kl_is_to_the_model_without_adapter(llama: Path) -> None:
    """At the start it is zero with zero gradient; after a step it is that of the two
    models' logprobs, and its weight in the loss is kl_coef."""
    mine = learner(load_tiny(llama))
    samples = group()
    base = [unpacked_logprobs(tiny_model(attention="sdpa"), s).detach() for s in samples]
    first = drain(mine.forward_backward(samples, LossSpec("pg", kl_coef=0.5)))
    assert first.metrics["reference_kl"] == pytest.approx(0.0, abs=1e-9)
    mine.optim_step(AdamParams(lr=1e-2))
    plain = drain(mine.forward_backward(samples, LossSpec("pg")))
    with_kl = drain(mine.forward_backward(samples, LossSpec("pg", kl_coef=0.5)))
    now = [torch.from_numpy(r[s.loss_mask]) for r, s in zip(plain.logprobs, samples, strict=True)]
    kl = [k3(n, b) for n, b in zip(now, base, strict=True)]
    assert with_kl.metrics["reference_kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    weighted = sum(float((k * torch.from_numpy(s.weights[s.loss_mask])).sum())
                   for k, s in zip(kl, samples, strict=True))  # fmt: skip
    assert with_kl.loss - plain.loss == pytest.approx(0.5 * weighted, rel=1e-2)


def test_proximal_logprobs_are_the_current_ones_where_unknown(llama: Path) -> None:
    seen: list[torch.Tensor] = []

    def spy(inputs: LossInput) -> LossOutput:
        seen.append(inputs.proximal_logprobs)
        return policy_gradient(inputs)

    known, unknown = group()[:2]
    known = replace(known, proximal_logprobs=np.full(len(known.token_ids), -2.5, np.float32))
    mine = Learner(load_tiny(llama), lambda _: spy, lambda _: k3, micro_batch_tokens=4096)
    result = drain(mine.forward_backward([known, unknown], LossSpec("spy")))
    expected = {-2.5} | {float(x) for x in result.logprobs[1][unknown.loss_mask]}
    assert set(seen[0].tolist()) == expected


def test_the_generator_leaves_the_adapter_free_between_micro_batches(llama: Path) -> None:
    weights = load_tiny(llama)
    mine = learner(weights, 20)
    one_step(mine, group())
    steps = mine.forward_backward(group(), LossSpec("pg"))
    ids = torch.tensor([[3, 4, 5]])
    next(steps)
    with weights.sampling() as model:
        before = plain_logits(model, ids)
    result = drain(steps)
    undisturbed = learner(weights, 20)
    expected = drain(undisturbed.forward_backward(group(), LossSpec("pg")))
    assert result.loss == expected.loss
    with weights.sampling() as model:
        assert torch.equal(plain_logits(model, ids), before)


def plain_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Without a plan of ours: the causal chain."""
    from astuner.engine.embedded.packed import forward
    from astuner.engine.embedded.tree_plan import TreePlan

    length = ids.shape[1]
    ends, positions = np.full(length, length), np.arange(length)
    plan = TreePlan(ends, positions, device=ids.device, dtype=torch.float32)
    return forward(model, ids[0], torch.arange(length), plan, torch.arange(length))


def test_a_bad_sample_is_named_and_adds_nothing(llama: Path) -> None:
    mine = learner(load_tiny(llama))
    good, bad = group()[:2]
    broken = np.full(len(bad.token_ids), np.nan, np.float32)
    for field in ("advantages", "weights"):
        with pytest.raises(EngineError, match=r"sample '1' .*" + field + " nan"):
            drain(mine.forward_backward([good, replace(bad, **{field: broken})], LossSpec("pg")))
        assert not mine.masters.pending
        assert not any(g.any() for g in mine.masters.gradients().values())


def test_a_bad_loss_function_is_named(llama: Path) -> None:
    def infinite(inputs: LossInput) -> LossOutput:
        return LossOutput(inputs.logprobs.sum() / 0, {})

    mine = Learner(load_tiny(llama), lambda _: infinite, lambda _: k3, micro_batch_tokens=99)
    with pytest.raises(EngineError, match=r"loss function 'odd' .* -inf from finite inputs"):
        drain(mine.forward_backward(group(), LossSpec("odd")))


def test_samples_without_advantages_are_refused(llama: Path) -> None:
    mine = learner(load_tiny(llama))
    bare = replace(group()[0], advantages=None)
    with pytest.raises(EngineError, match="Sample '0' has no advantages"):
        drain(mine.forward_backward([bare], LossSpec("pg")))
    (logprobs,) = drain(mine.forward([bare]))
    assert logprobs[bare.loss_mask].all()


def test_a_gradient_that_is_not_finite_is_dropped(llama: Path) -> None:
    mine = learner(load_tiny(llama))
    one_step(mine, group())
    before = {n: v.clone() for n, v in mine.masters.values().items()}
    drain(mine.forward_backward(group(), LossSpec("pg")))
    next(iter(mine.masters.gradients().values()))[0, 0] = math.inf
    with pytest.raises(EngineError, match="norm is inf: the step was not taken"):
        mine.optim_step(AdamParams(lr=1.0))
    assert all(torch.equal(v, before[n]) for n, v in mine.masters.values().items())
    assert mine.optim_step(AdamParams(lr=1.0))["skipped"] == 1.0


def test_a_backward_pass_that_broke_off_leaves_nothing(llama: Path) -> None:
    weights = load_tiny(llama)
    mine, undisturbed = learner(weights), learner(load_tiny(llama))
    next(iter(weights.states.trained().values())).grad = torch.ones(4, 32)
    for each in (mine, undisturbed):
        drain(each.forward_backward(group(), PG))
    expected = undisturbed.masters.gradients()
    assert all(torch.equal(g, expected[n]) for n, g in mine.masters.gradients().items())


def test_greedy_samples_are_scored_without_temperature(llama: Path) -> None:
    mine = learner(load_tiny(llama))
    greedy, plain = (drain(mine.forward(group(), temperature=t)) for t in (0.0, 1.0))
    assert all(np.array_equal(g, p) for g, p in zip(greedy, plain, strict=True))
    assert all(np.isfinite(g).all() and g.any() for g in greedy)


def test_logprobs_in_chunks_are_those_of_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astuner.engine.embedded.logprobs.CHUNK_ELEMENTS", 50)  # 2 rows of 5
    logits = torch.randn(5, 23, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows, targets = torch.tensor([0, 0, 4, 2, 0, 2]), torch.tensor([1, 1, 22, 0, 7, 3])
    mine, entropy = token_logprobs(logits, rows, targets, 0.8)
    softmax = (logits / 0.8).log_softmax(-1)
    torch.testing.assert_close(mine, softmax[rows, targets])
    torch.testing.assert_close(entropy, -(softmax.exp() * softmax).sum(-1))
    seed = torch.arange(1.0, 7.0)
    (gradient,) = torch.autograd.grad(mine, logits, seed)
    (expected,) = torch.autograd.grad(softmax[rows, targets], logits, seed)
    torch.testing.assert_close(gradient, expected)
    assert gradient.data_ptr() == logits.data_ptr()  # in no memory of its own


def test_entropy_of_impossible_tokens_is_finite() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([0]), torch.tensor([1]), 1.0)
    assert logprobs.tolist() == entropy.neg().tolist() == pytest.approx([-math.log(2)])
