"""verl with our settings computes what astuner's own trainer does: losses, KL, rates.

The same rows go through astuner's loss and through verl's, with the gradient compared.
Rows are timelines; one episode has two, so that weighing by episodes shows.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from astuner.algorithm import AGGREGATIONS, accepted, find_kl, find_loss, resolve
from astuner.algorithm.assign import weigh
from astuner.backbone.verl import learning, sections
from astuner.backbone.verl.compose import compose
from astuner.backbone.verl.translate import to_verl
from astuner.config.load import load_config
from astuner.config.schema import AstunerConfig
from astuner.engine.protocol import LossInput
from astuner.trainer.schedule import learning_rate
from astuner.types import Sample

pytestmark = pytest.mark.verl

ALGORITHM = "trainer_common.algorithm"
LONGEST = 6
LENGTHS = (5, 3, 6, 2)
EPISODES = ("a", "a", "b", "c")
"""Row -> its episode: one of two timelines, two of one."""
NUM_EPISODES = 3


def configured(*overrides: str) -> tuple[AstunerConfig, Any]:
    """Ours, and the actor's part of verl's."""
    from verl.utils.config import omega_conf_to_dataclass

    config = load_config(None, [f"data.max_response_length={LONGEST}", *overrides]).config
    settings = to_verl(config, run_dir=Path("/r"), device="cpu")
    composed = _composed()  # reading verl's YAML anew for each test would take minutes
    for key, value in settings.items():
        if key.startswith(sections.ACTOR):
            OmegaConf.update(composed, key, value, merge=False, force_add=True)
    actor = omega_conf_to_dataclass(composed.actor_rollout_ref.actor)
    actor.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=sum(LENGTHS),
        global_batch_size=NUM_EPISODES,
        loss_scale_factor=actor.loss_scale_factor,
    )
    return config, actor


@cache
def _composed() -> Any:
    return compose(to_verl(AstunerConfig(), run_dir=Path("/r"), device="cpu"))


def rows(seed: int = 0) -> dict[str, torch.Tensor]:
    """Logprobs under the four policies, [rows, LONGEST], and advantages, with wide ratios."""
    random = torch.Generator().manual_seed(seed)

    def draw(spread: float) -> torch.Tensor:
        return torch.randn(len(LENGTHS), LONGEST, generator=random, dtype=torch.float64) * spread

    proximal = draw(0.5) - 2
    return {
        "proximal": proximal,
        "current": proximal + draw(1.0),
        "behaviour": proximal + draw(1.0),
        "reference": proximal + draw(0.5),
        "advantages": draw(1.0)[:, :1].expand(-1, LONGEST).clone(),
        "mask": torch.tensor([[t < n for t in range(LONGEST)] for n in LENGTHS]),
    }


def weights_of(config: AstunerConfig) -> torch.Tensor:
    """Our weight of every token, [rows, LONGEST]."""
    samples = [
        Sample(
            sample_id=str(row),
            episode_id=EPISODES[row],
            group_id="g",
            task_id="t",
            agent_name="default",
            target_tag="default",
            token_ids=np.zeros(LONGEST, np.int32),
            loss_mask=np.arange(LONGEST) < length,
            logprobs=np.zeros(LONGEST, np.float32),
        )
        for row, length in enumerate(LENGTHS)
    ]
    mode = config.trainer_common.algorithm.loss_agg_mode
    weighed = weigh(samples, resolve(AGGREGATIONS, mode), config.data.max_response_length)
    return torch.from_numpy(np.stack([s.weights for s in weighed])).double()


def row_weights(config: AstunerConfig) -> torch.Tensor:
    """What the agent loop multiplies a row's advantages by (`outputs.advantage_rows`)."""
    if config.trainer_common.algorithm.loss_agg_mode != "episode-mean":
        return torch.ones(len(LENGTHS), 1).double()
    of_episode = [
        sum(n for n, e in zip(LENGTHS, EPISODES, strict=True) if e == own) for own in EPISODES
    ]
    return torch.tensor([[n / whole] for n, whole in zip(LENGTHS, of_episode, strict=True)])


def ours(config: AstunerConfig, data: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    own = config.trainer_common.algorithm
    function = find_loss(own.loss)
    clips = {"clip_low": own.clip_ratio_low, "clip_high": own.clip_ratio_high}
    offered = {k: v for k, v in clips.items() if v >= 0} | {"tis_cap": own.tis_cap}
    current, mask = data["current"].clone().requires_grad_(), data["mask"]
    inputs = LossInput(
        logprobs=current[mask],
        behaviour_logprobs=data["behaviour"][mask],
        proximal_logprobs=data["proximal"][mask],
        reference_logprobs=None,
        advantages=data["advantages"][mask],
        weights=weights_of(config)[mask],
        segments=torch.arange(len(LENGTHS))[:, None].expand(-1, LONGEST)[mask],
        num_segments=len(LENGTHS),
    )
    loss = function(inputs, **accepted(function, offered)).loss
    loss.backward()
    assert current.grad is not None
    return loss.item(), current.grad


def verls(
    config: AstunerConfig, actor: Any, data: dict[str, torch.Tensor]
) -> tuple[float, torch.Tensor]:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    correction = learning.algorithm(config)
    prefix = "algorithm.rollout_correction"
    old, truncated = data["proximal"], None
    if correction[f"{prefix}.bypass_mode"]:
        old = data["behaviour"]
    elif correction[f"{prefix}.rollout_is"]:
        truncated, _ = compute_rollout_correction_weights(
            data["proximal"] - data["behaviour"],
            data["mask"].double(),
            rollout_is=correction[f"{prefix}.rollout_is"],
            rollout_is_threshold=correction[f"{prefix}.rollout_is_threshold"],
        )
    current = data["current"].clone().requires_grad_()
    loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
        old_log_prob=old,
        log_prob=current,
        advantages=data["advantages"] * row_weights(config),
        response_mask=data["mask"],
        loss_agg_mode=actor.loss_agg_mode,
        config=actor,
        rollout_is_weights=truncated,
    )
    loss.backward()
    assert current.grad is not None
    return loss.item(), current.grad


@pytest.mark.parametrize("aggregation", ["episode-mean", "token-mean", "constant"])
@pytest.mark.parametrize("tis_cap", [0.0, 2.0])
@pytest.mark.parametrize(
    "loss",
    [
        ("loss=ppo",),
        ("loss=ppo", "clip_ratio_low=0.1", "clip_ratio_high=0.28"),
        ("loss=gspo",),
        ("loss=gspo", "clip_ratio_low=0.2", "clip_ratio_high=0.3"),
        ("loss=cispo",),
        ("loss=importance_sampling",),
        ("loss=policy_gradient",),
    ],
)
def test_losses(loss: tuple[str, ...], tis_cap: float, aggregation: str) -> None:
    config, actor = configured(
        f"{ALGORITHM}.tis_cap={tis_cap}",
        f"{ALGORITHM}.loss_agg_mode={aggregation}",
        *(f"{ALGORITHM}.{setting}" for setting in loss),
    )
    for seed in range(3):
        data = rows(seed)
        our_loss, our_gradient = ours(config, data)
        their_loss, their_gradient = verls(config, actor, data)
        assert our_gradient.abs().max() > 1e-3
        assert their_loss == pytest.approx(our_loss, abs=1e-6)
        torch.testing.assert_close(their_gradient, our_gradient, atol=1e-6, rtol=1e-5)


def test_without_the_rows_weights_episodes_would_not_count_alike() -> None:
    """The comparison above can fail: it sees how a row is weighed."""
    config, actor = configured(f"{ALGORITHM}.loss=importance_sampling")
    data = rows()
    unweighed = replace_advantages(data, data["advantages"] / row_weights(config))
    assert verls(config, actor, unweighed)[0] != pytest.approx(ours(config, data)[0], abs=1e-3)


def replace_advantages(
    data: dict[str, torch.Tensor], advantages: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {**data, "advantages": advantages}


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
def test_kl_below_the_cut_of_k3(kind: str) -> None:
    from verl.trainer.ppo.core_algos import kl_penalty

    data = rows()
    mine, theirs = (data["current"].clone().requires_grad_() for _ in range(2))
    our_kl = find_kl(kind)(mine, data["reference"])
    their_kl = kl_penalty(theirs, data["reference"], learning.KLS[kind])
    assert float(our_kl.detach().max()) < 10
    torch.testing.assert_close(their_kl, our_kl)
    our_kl.sum().backward()
    their_kl.sum().backward()
    torch.testing.assert_close(theirs.grad, mine.grad)


@pytest.mark.parametrize(
    ("schedule", "warmup"), [("constant", 0), ("constant", 1), ("constant", 4), ("cosine", 0)]
)
def test_learning_rates(schedule: str, warmup: int) -> None:
    total = 10
    config, actor = configured(
        f"trainer_common.optim.lr_schedule={schedule}",
        f"trainer_common.optim.warmup_steps={warmup}",
        "trainer_common.optim.lr=0.5",
    )
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=actor.optim.lr)
    scheduler = _scheduler(optimizer, actor.optim, total)
    theirs: list[float] = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()  # once a training step: engine_workers.py, train_mini_batch
    assert theirs == pytest.approx(
        [
            learning_rate(step, lr=0.5, schedule=schedule, warmup_steps=warmup, total_steps=total)
            for step in range(1, total + 1)
        ]
    )
    assert config.trainer_common.optim.lr == 0.5


def _scheduler(optimizer: torch.optim.Optimizer, optim: Any, total: int) -> Any:
    """By verl's own engine, which needs of itself only the optimizer's settings."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    class Bare:
        rank = 1
        optimizer_config = optim

    optim.total_training_steps = total
    return FSDPEngine._build_lr_scheduler(Bare(), optimizer)  # type: ignore[arg-type]


def test_the_optimizer_is_adamw_with_our_numbers() -> None:
    from verl.workers.config.optimizer import build_optimizer

    _, actor = configured(
        "trainer_common.optim.betas=[0.8, 0.95]", "trainer_common.optim.weight_decay=0.1"
    )
    optimizer = build_optimizer([torch.zeros(1, requires_grad=True)], actor.optim)
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.AdamW
    assert (tuple(group["betas"]), group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-8, 0.1)


# ---------------------------------------------------------------- packed rows


def test_rows_in_one_pack_do_not_see_each_other_without_flash_attention(
    tiny_model_dir: Path,
) -> None:
    """On GPUs verl packs rows into one, tells them apart by their positions alone, and leaves
    the rest to the attention (engine/fsdp/transformer_impl.py:1254). PyTorch's, which we ask
    for where flash-attn is missing, has to keep them apart as well."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train()
    rows = [torch.randint(0, 400, (length,)) for length in LENGTHS]
    positions = torch.cat([torch.arange(len(row)) for row in rows])

    def logits(ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        called = {"input_ids": ids[None], "position_ids": at[None], "attention_mask": None}
        return model(**called, use_cache=False).logits[0]

    packed = logits(torch.cat(rows), positions).split(LENGTHS)
    for row, seen in zip(rows, packed, strict=True):
        alone = logits(row, torch.arange(len(row)))
        torch.testing.assert_close(seen, alone, rtol=0, atol=1e-5)
    joined = logits(torch.cat(rows), torch.arange(sum(LENGTHS)))  # the figure can tell
    assert (joined[LENGTHS[0] :] - torch.cat(packed)[LENGTHS[0] :]).abs().max() > 1e-3
