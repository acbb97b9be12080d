"""How Trinity learns, such that it is as astuner does: advantages, loss, optimizer.

Trinity takes parts of its algorithm by dotted path, so advantages, loss and batches are
astuner's own code (`advantage`, `loss`, `batches`), and only the optimizer is Trinity's.
Pure functions to flat dotted keys of Trinity's `Config`. File and line numbers in comments
are those of Trinity-RFT 0.6.0.
"""

from __future__ import annotations

from astuner.backbone.trinity.sections import (
    NO_LIMIT,
    PACKAGE,
    Route,
    Settings,
    max_staleness,
    trainer_gpus,
)
from astuner.config.schema import AstunerConfig

ALGORITHM = "multi_step_grpo"
"""Trinity's kind of run: groups of episodes, each of which may be several samples."""
ADVANTAGE = f"{PACKAGE}.advantage.GroupAdvantage"
LOSS = f"{PACKAGE}.loss.PolicyLoss"
BATCHES = f"{PACKAGE}.batches.WholeBatches"


def algorithm(config: AstunerConfig, way: Route) -> Settings:
    own, trainer = config.trainer_common.algorithm, config.trainer_common
    return {
        "algorithm.algorithm_type": ALGORITHM,
        "algorithm.repeat_times": config.rollout.num_repeat,
        "algorithm.advantage_fn": ADVANTAGE,
        "algorithm.policy_loss_fn": LOSS,
        "algorithm.policy_loss_fn_args": {
            "loss": own.loss,
            "clip_low": own.clip_ratio_low,
            "clip_high": own.clip_ratio_high,
            "tis_cap": own.tis_cap,
            "kl_type": trainer.kl_loss_type if trainer.use_kl_loss else "",
            "kl_coef": trainer.kl_loss_coef,
            "processes": 1 if way == "service" else trainer_gpus(config),
        },
        "algorithm.sample_strategy": BATCHES,
        "algorithm.sample_strategy_args": {
            "max_staleness": max_staleness(config),
            "multiple_of": (
                0 if way == "service" else config.data.train_batch_size * config.rollout.num_repeat
            ),
        },
        **_left_to_the_loss(),
    }


def _left_to_the_loss() -> Settings:
    """Weights and KL are in the loss. The last two keys together keep the Tinker trainer from
    dividing it by the number of samples (trainer/tinker/tinker_trainer.py:252); verl's part
    never divides."""
    return {
        "algorithm.kl_penalty_fn": "none",
        "algorithm.kl_loss_fn": "none",
        "algorithm.entropy_loss_fn": "none",
        "algorithm.bypass_old_logprobs": True,
        "algorithm.loss_agg_mode": "token-mean",
        "trainer.fix_actor_microbatch_loss_scale": True,
    }


def optimizer(config: AstunerConfig) -> Settings:
    own, prefix = config.trainer_common.optim, "algorithm.optimizer"
    return {
        f"{prefix}.lr": own.lr,
        f"{prefix}.betas": list(own.betas),
        f"{prefix}.weight_decay": own.weight_decay,
        f"{prefix}.clip_grad": own.max_grad_norm or NO_LIMIT,
        f"{prefix}.lr_scheduler_type": own.lr_schedule,
        f"{prefix}.lr_warmup_steps": own.warmup_steps,
        f"{prefix}.lr_warmup_steps_ratio": 0.0,
        f"{prefix}.min_lr_ratio": 0.0,
        f"{prefix}.optimizer_type": "adam",
    }
