"""Everything the training loop is told, resolved from the configuration and checked.

Algorithms are known here by name and as opaque functions; which of the clip ranges
and caps a loss reads is found from its signature. Nothing is started or loaded but
the functions themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from astuner.algorithm import ADVANTAGES, AGGREGATIONS, accepted, find_kl, find_loss, resolve
from astuner.algorithm.advantages import Estimator
from astuner.algorithm.aggregation import Aggregation
from astuner.config.schema import AstunerConfig, TrainerConfig
from astuner.config.targets import own_targets
from astuner.engine.protocol import AdamParams, LossSpec
from astuner.errors import ConfigError
from astuner.trainer.schedule import check_schedule, learning_rate
from astuner.types import Sample

NOT_IN_HASH = {
    "": ("project_name", "experiment_name", "experiment_dir", "debug", "model_tuner"),
    "trainer_common": (
        "total_epochs",
        "total_steps",
        "save_freq",
        "resume_freq",
        "keep_checkpoints",
        "test_freq",
        "val_before_train",
        "logger",
        "ray_address",
        "stall_timeout",
    ),
}
"""Keys that may change between a run and its resumption without a word."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    total_steps: int
    estimator: Estimator
    aggregation: Aggregation
    loss: LossSpec
    max_response_length: int
    lr: float
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mini_batch_num: int = 1
    dynamic_sampling: bool = False
    max_refill_rounds: int = 3
    save_freq: int = 0
    resume_freq: int = 0
    test_freq: int = 0
    val_before_train: bool = True
    seed: int = 0
    config_hash: str = ""
    rollout_deadline: float = 0.0
    """Seconds the source may take for a step's groups before it counts as hung; 0 waits on."""
    notice_seconds: float = 5.0
    """How often `Progress.waiting` is called while the source has not answered."""
    own_targets: frozenset[str] = frozenset()
    """Target tags with an adapter of their own; all others share one."""

    def adapter_of(self, sample: Sample) -> str:
        """The target whose own adapter the sample trains; "" for the shared one."""
        return sample.target_tag if sample.target_tag in self.own_targets else ""

    def adam(self, step: int) -> AdamParams:
        """The optimizer's settings in this step."""
        rate = learning_rate(
            step,
            lr=self.lr,
            schedule=self.lr_schedule,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )
        return AdamParams(
            lr=rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )

    @classmethod
    def from_config(cls, config: AstunerConfig, steps_per_epoch: int) -> TrainSettings:
        """Raises ConfigError for an unknown algorithm or a value out of range."""
        trainer = config.trainer_common
        check_trainer(trainer)
        return cls(
            total_steps=trainer.total_steps or trainer.total_epochs * steps_per_epoch,
            estimator=resolve(ADVANTAGES, trainer.algorithm.adv_estimator, "advantage estimator"),
            aggregation=resolve(AGGREGATIONS, trainer.algorithm.loss_agg_mode, "aggregation"),
            loss=loss_spec(trainer, config.rollout.temperature),
            max_response_length=config.data.max_response_length,
            lr=trainer.optim.lr,
            lr_schedule=trainer.optim.lr_schedule,
            warmup_steps=trainer.optim.warmup_steps,
            betas=(trainer.optim.betas[0], trainer.optim.betas[1]),
            weight_decay=trainer.optim.weight_decay,
            max_grad_norm=trainer.optim.max_grad_norm,
            mini_batch_num=trainer.mini_batch_num,
            dynamic_sampling=trainer.algorithm.dynamic_sampling,
            max_refill_rounds=trainer.algorithm.max_refill_rounds,
            save_freq=trainer.save_freq,
            resume_freq=trainer.resume_freq,
            test_freq=trainer.test_freq,
            val_before_train=trainer.val_before_train,
            seed=config.seed,
            config_hash=config_hash(config),
            rollout_deadline=rollout_deadline(config),
            own_targets=own_targets(config),
        )


def check_trainer(trainer: TrainerConfig) -> None:
    """Raises ConfigError for a value that cannot be meant."""
    check_schedule(trainer.optim.lr_schedule)
    find_kl(trainer.kl_loss_type)
    at_least: Mapping[str, tuple[float, float]] = {
        "total_epochs": (trainer.total_epochs, 0),
        "total_steps": (trainer.total_steps, 0),
        "save_freq": (trainer.save_freq, 0),
        "resume_freq": (trainer.resume_freq, 0),
        "test_freq": (trainer.test_freq, 0),
        "mini_batch_num": (trainer.mini_batch_num, 1),
        "optim.lr": (trainer.optim.lr, 0),
        "optim.warmup_steps": (trainer.optim.warmup_steps, 0),
        "optim.max_grad_norm": (trainer.optim.max_grad_norm, 0),
        "algorithm.tis_cap": (trainer.algorithm.tis_cap, 0),
        "kl_loss_coef": (trainer.kl_loss_coef, 0),
    }
    for key, (value, least) in at_least.items():
        if not value >= least:
            raise ConfigError(f"trainer_common.{key} is {value}; it must be at least {least}.")
    if len(trainer.optim.betas) != 2:
        raise ConfigError(
            f"trainer_common.optim.betas is {trainer.optim.betas}; it needs two numbers, "
            "such as [0.9, 0.999]."
        )


def loss_spec(trainer: TrainerConfig, temperature: float) -> LossSpec:
    """The loss by name, with those of the configured parameters that it reads."""
    algorithm = trainer.algorithm
    clips = {"clip_low": algorithm.clip_ratio_low, "clip_high": algorithm.clip_ratio_high}
    offered = {name: clip for name, clip in clips.items() if clip >= 0}
    offered["tis_cap"] = algorithm.tis_cap
    return LossSpec(
        name=algorithm.loss,
        params=accepted(find_loss(algorithm.loss), offered),
        kl_coef=trainer.kl_loss_coef if trainer.use_kl_loss else 0.0,
        kl_type=trainer.kl_loss_type,
        temperature=temperature,
    )


def config_hash(config: AstunerConfig) -> str:
    """Of everything that changes what is learnt: 16 hex digits."""
    tree: dict[str, Any] = asdict(config)
    for section, keys in NOT_IN_HASH.items():
        part = tree[section] if section else tree
        for key in keys:
            part.pop(key)
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:16]


def rollout_deadline(config: AstunerConfig) -> float:
    """Twice what a step takes when every episode runs into each of its own deadlines."""
    rollout = config.rollout
    episodes = config.data.train_batch_size * rollout.num_repeat
    waves = ceil(episodes / max(1, rollout.max_env_worker))
    one = rollout.episode_timeout + rollout.judge_timeout
    return 2 * waves * one * (rollout.max_retries + 1)
