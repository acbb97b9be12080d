"""Trinity's own trainer code, with our parts in it, computes what `local` does.

Its class for Tinker services is made without a service and given logprobs of ours; loss,
gradient and learning rates are compared with astuner's own functions. Everything here runs
in Trinity's environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from astuner.algorithm import accepted, find_kl, find_loss
from astuner.backbone.spawned.choices import Facts
from astuner.backbone.trinity.compose import compose
from astuner.backbone.trinity.translate import to_trinity
from astuner.config.load import load_config
from astuner.engine.embedded.losses import loss_of
from astuner.engine.protocol import LossInput, LossSpec
from astuner.trainer.schedule import learning_rate

pytestmark = pytest.mark.trinity

LOSS = "trainer_common.algorithm"
MASKS = ([1, 1, 0, 1, 1], [1, 0, 0, 1], [1], [1, 1, 1])
"""Of the responses of two episodes, of two timelines each."""
EPISODES = ("g/a", "g/a", "g/b", "g/b")


def trainer(*overrides: str, steps: int = 10) -> Any:
    """Trinity's trainer for services as far as it computes."""
    from trinity.common.config_validator import AlgorithmConfigValidator
    from trinity.trainer.tinker.tinker_trainer import TinkerTrainerWrapper

    config = load_config(None, overrides, backbone="trinity").config
    told = to_trinity(
        config,
        run_dir=Path("/x"),
        service_url="http://127.0.0.1:1",
        device="cpu",
        facts=Facts(total_steps=steps),
    )
    settings = compose(told)
    AlgorithmConfigValidator().validate(settings)
    made = object.__new__(TinkerTrainerWrapper)
    made.config, made.logger = settings, SimpleNamespace(info=print, warning=print)
    made._init_algorithm()
    return made


def experiences(seed: int) -> list[Any]:
    """With unequal advantages, as our workflow leaves them, and weighed."""
    from trinity.common.experience import Experience

    from astuner.backbone.trinity.weighing import weights_of

    random = np.random.default_rng(seed)
    weights = weights_of(EPISODES, [np.array(m, bool) for m in MASKS], "episode-mean", 8)
    made: list[Any] = []
    for mask, weight in zip(MASKS, weights, strict=True):
        size = len(mask)
        exp = Experience(
            tokens=list(range(3 + size)),
            prompt_length=3,
            logprobs=(-random.random(size) * np.array(mask)).tolist(),
            action_mask=[bool(m) for m in mask],
            advantages=(random.normal(size=size) * np.array(mask)).tolist(),
            reward=1.0,
        )
        exp.returns = torch.from_numpy(weight)
        made.append(exp)
    return made


def ours(exps: list[Any], logprobs: torch.Tensor, reference: torch.Tensor, spec: LossSpec) -> Any:
    """The loss over all trained tokens at once, as `local` has it."""
    mask = torch.cat([exp.action_mask.bool() for exp in exps])
    segments = torch.cat([torch.full((len(e.action_mask),), n) for n, e in enumerate(exps)])

    def flat(name: str) -> torch.Tensor:
        return torch.cat([getattr(exp, name) for exp in exps])[mask]

    inputs = LossInput(
        logprobs=logprobs[mask],
        behaviour_logprobs=flat("logprobs"),
        proximal_logprobs=logprobs[mask].detach(),
        reference_logprobs=reference[mask] if spec.kl_coef else None,
        advantages=flat("advantages"),
        weights=flat("returns"),
        segments=segments[mask],
        num_segments=len(exps),
    )
    return loss_of(inputs, spec, find_loss, find_kl)[0]


@pytest.mark.parametrize(
    ("overrides", "name", "params", "kl"),
    [
        ((), "ppo", {"tis_cap": 2.0}, ("k3", 0.0)),
        ((f"{LOSS}.tis_cap=0",), "ppo", {"tis_cap": 0.0}, ("k3", 0.0)),
        ((f"{LOSS}.tis_cap=0", f"{LOSS}.clip_ratio_high=0.01"), "ppo",
         {"clip_high": 0.01, "tis_cap": 0.0}, ("k3", 0.0)),
        ((f"{LOSS}.loss=gspo", f"{LOSS}.tis_cap=0"), "gspo", {"tis_cap": 0.0}, ("k3", 0.0)),
        ((f"{LOSS}.loss=cispo",), "cispo", {"tis_cap": 2.0}, ("k3", 0.0)),
        ((f"{LOSS}.loss=policy_gradient",), "policy_gradient", {}, ("k3", 0.0)),
        (("trainer_common.use_kl_loss=true", "trainer_common.kl_loss_coef=0.5"), "ppo",
         {"tis_cap": 2.0}, ("k3", 0.5)),
        (("trainer_common.use_kl_loss=true", "trainer_common.kl_loss_type=k1",
          "trainer_common.kl_loss_coef=0.5"), "ppo", {"tis_cap": 2.0}, ("k1", 0.5)),
    ],
)  # fmt: skip
def test_loss_and_gradient(
    overrides: tuple[str, ...], name: str, params: Mapping[str, float], kl: tuple[str, float]
) -> None:
    from trinity.trainer.tinker.utils import to_tinker_input

    engine, exps = trainer(*overrides), experiences(3)
    sizes = [len(mask) for mask in MASKS]
    generator = torch.Generator().manual_seed(1)
    logprobs = (-torch.rand(sum(sizes), generator=generator)).requires_grad_()
    reference = -torch.rand(sum(sizes), generator=generator)

    _, _, engine.model_inputs_list = to_tinker_input(exps, engine.logger)
    for inputs, part in zip(engine.model_inputs_list, reference.split(sizes), strict=True):
        inputs["ref_logprob"] = part
    theirs, told = engine._loss_func([], list(logprobs.split(sizes)))
    gradient = torch.autograd.grad(theirs, logprobs)[0]

    spec = LossSpec(name, accepted(find_loss(name), dict(params)), kl_coef=kl[1], kl_type=kl[0])
    expected = ours(exps, logprobs, reference, spec)
    torch.testing.assert_close(theirs, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logprobs)[0])
    assert gradient.abs().sum() > 0.01
    assert told["actor/pg_loss"] == pytest.approx(theirs.item() / len(exps))


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_every_step_has_our_learning_rate(warmup: int) -> None:
    engine = trainer("trainer_common.optim.lr=0.5", f"trainer_common.optim.warmup_steps={warmup}")
    for step in range(1, 11):
        engine._train_step_num = step
        ours = learning_rate(step, lr=0.5, schedule="constant", warmup_steps=warmup, total_steps=10)
        assert engine.current_learning_rate == pytest.approx(ours)


def test_the_optimizer_is_told_our_settings() -> None:
    engine = trainer(
        "trainer_common.optim.betas=[0.8,0.9]", "trainer_common.optim.weight_decay=0.1",
        "trainer_common.optim.max_grad_norm=0.3",
    )  # fmt: skip
    engine._train_step_num = 1
    adam = engine.adam_params
    assert (adam.beta1, adam.beta2, adam.weight_decay, adam.grad_clip_norm) == (0.8, 0.9, 0.1, 0.3)
    assert (adam.learning_rate, adam.eps) == (1e-5, 1e-12)


def test_why_cosine_is_refused_on_a_service() -> None:
    """When Trinity's last step has a rate above 0, the refusal can go."""
    engine = trainer("trinity.algorithm.optimizer.lr_scheduler_type=cosine")
    engine._train_step_num = 10
    assert engine.current_learning_rate == 0.0


def test_a_batch_is_filled_up_with_what_trains_nothing() -> None:
    from astuner.backbone.trinity.batches import filled

    exps = experiences(3)
    rows = filled(exps, 3)
    assert rows[:4] == exps and len(rows) == 6
    for extra in rows[4:]:
        assert extra.tokens.tolist() == exps[2].tokens.tolist()
        assert not extra.action_mask.any() and not extra.returns.any()
    assert exps[2].action_mask.all()
    assert [len(filled(exps, n)) for n in (0, 1, 2, 4, 8)] == [4, 4, 4, 4, 8]


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_parts_of_a_padded_batch_add_up_for_verls_trainer(name: str) -> None:
    """verl's trainer sums what the loss gives for each micro-batch, and averages gradients over
    its processes."""
    from astuner.backbone.trinity.loss import PolicyLoss

    exps = experiences(5)

    def padded(name: str) -> torch.Tensor:
        rows = [getattr(exp, name).float() for exp in exps]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    logprobs = (padded("logprobs") - 0.1).requires_grad_()
    old, mask = padded("logprobs"), padded("action_mask").bool()
    advantages, weights = padded("advantages"), padded("returns")
    loss = PolicyLoss(backend="verl", loss=name, tis_cap=0.0, processes=2)
    # verl's trainer hands over exactly these, by its own names (trainer/verl/losses.py)
    assert loss.select_keys == [
        "old_log_probs", "response_mask", "advantages", "returns", "ref_log_prob"
    ]  # fmt: skip

    def of(rows: slice) -> torch.Tensor:
        given = {"old_log_probs": old, "response_mask": mask, "advantages": advantages}
        given |= {"returns": weights, "ref_log_prob": torch.zeros_like(old)}
        return loss(logprob=logprobs[rows], **{k: v[rows] for k, v in given.items()})[0]

    parts = of(slice(0, 1)) + of(slice(1, 4))
    spec = LossSpec(name, accepted(find_loss(name), {"tis_cap": 0.0}))
    flat = torch.cat([row[: len(m)] for row, m in zip(logprobs, MASKS, strict=True)])
    torch.testing.assert_close(parts, of(slice(0, 4)))
    torch.testing.assert_close(parts, 2 * ours(exps, flat, flat.detach(), spec))
