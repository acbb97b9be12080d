"""How verl learns, such that it is as astuner does: loss, correction, optimizer, batches.

Pure functions to flat dotted verl keys, as in `sections`; a test runs verl's losses and
rates against ours. File and line numbers in comments are those of verl 0.9.1.
"""

from __future__ import annotations

from collections.abc import Mapping

from astuner.backbone.spawned.choices import Device
from astuner.backbone.verl.sections import ACTOR, ESTIMATOR, REF, ROLLOUT, Settings, longest
from astuner.config.schema import AstunerConfig

NO_LIMIT = 1e9
"""Above any probability ratio: both losses cut the log-ratio at 20, and e^20 is 4.9e8."""
PADDING_TOKENS = 128
"""Of the rows that verl pads a batch with (trainer/ppo/padding_utils.py:43)."""

LOSSES: Mapping[str, tuple[str, float, float]] = {
    "ppo": ("vanilla", 0.2, 0.2),
    "gspo": ("gspo", 3e-4, 4e-4),
    "cispo": ("cispo", 1.0, 0.2),
    "importance_sampling": ("vanilla", NO_LIMIT, NO_LIMIT),
    "policy_gradient": ("gpg", 0.0, 0.0),
}
"""astuner's loss -> verl's loss_mode, and the clip range it has where none is set."""
UNCLIPPED = ("importance_sampling", "policy_gradient")
UNCORRECTED = ("policy_gradient",)
"""Takes no notice of who sampled the tokens."""
AGGREGATIONS: Mapping[str, str] = {
    "episode-mean": "seq-mean-token-mean",
    "token-mean": "token-mean",
    "constant": "seq-mean-token-sum-norm",
}
"""`outputs` weighs the rows such that these means over rows are ours over episodes."""
KLS: Mapping[str, str] = {"k1": "k1+", "k2": "k2", "k3": "k3", "low_var_kl": "low_var_kl"}
"""Our k1 has the gradient of k2, which is verl's "k1+" (core_algos.py:2188)."""


def algorithm(config: AstunerConfig) -> Settings:
    own, trainer = config.trainer_common.algorithm, config.trainer_common
    settings: Settings = {
        "algorithm.adv_estimator": ESTIMATOR,
        "algorithm.use_kl_in_reward": False,
        f"{ACTOR}.loss_agg_mode": AGGREGATIONS.get(own.loss_agg_mode),
        f"{ACTOR}.loss_scale_factor": (
            config.data.max_response_length if own.loss_agg_mode == "constant" else None
        ),
        f"{ACTOR}.entropy_coeff": 0,
        f"{ACTOR}.use_kl_loss": trainer.use_kl_loss,
        **_loss(config),
        **_correction(config),
    }
    if trainer.use_kl_loss:
        settings[f"{ACTOR}.kl_loss_coef"] = trainer.kl_loss_coef
        settings[f"{ACTOR}.kl_loss_type"] = KLS.get(trainer.kl_loss_type)
    return settings


def _loss(config: AstunerConfig) -> Settings:
    own = config.trainer_common.algorithm
    if own.loss not in LOSSES:  # refused, unless a raw setting says which, and with what limits
        return {f"{ACTOR}.policy_loss.loss_mode": ""}
    name, low, high = LOSSES[own.loss]
    if own.loss not in UNCLIPPED:
        low = low if own.clip_ratio_low < 0 else own.clip_ratio_low
        high = high if own.clip_ratio_high < 0 else own.clip_ratio_high
    return {
        f"{ACTOR}.policy_loss.loss_mode": name,
        f"{ACTOR}.clip_ratio_low": low,
        f"{ACTOR}.clip_ratio_high": high,
        f"{ACTOR}.clip_ratio_c": NO_LIMIT,  # no dual clip
    }


def _correction(config: AstunerConfig) -> Settings:
    """Truncated importance sampling is verl's token-level rollout correction. Without it the
    ratio is to the sampler's own logprobs, which verl calls bypass."""
    own, prefix = config.trainer_common.algorithm, "algorithm.rollout_correction"
    corrected = own.tis_cap > 0 and own.loss not in UNCORRECTED
    return {
        f"{prefix}.rollout_is": "token" if corrected else None,
        f"{prefix}.rollout_is_threshold": own.tis_cap if corrected else 2.0,
        f"{prefix}.rollout_is_batch_normalize": False,
        f"{prefix}.rollout_rs": None,
        f"{prefix}.bypass_mode": own.tis_cap == 0 and own.loss not in UNCORRECTED,
    }


def optimizer(config: AstunerConfig) -> Settings:
    own, prefix = config.trainer_common.optim, f"{ACTOR}.optim"
    return {
        f"{prefix}.lr": own.lr,
        f"{prefix}.betas": list(own.betas),
        f"{prefix}.weight_decay": own.weight_decay,
        f"{prefix}.clip_grad": own.max_grad_norm or NO_LIMIT,
        f"{prefix}.lr_warmup_steps": own.warmup_steps,
        f"{prefix}.lr_warmup_steps_ratio": 0.0,
        f"{prefix}.min_lr_ratio": 0.0,
        **_schedule(config),
    }


def _schedule(config: AstunerConfig) -> Settings:
    """verl's constant schedule wastes its first warm-up step on a rate of 0
    (torch_functional.py:785). Its cosine over no cycles is constant too, and can count from 1."""
    own, prefix = config.trainer_common.optim, f"{ACTOR}.optim"
    warm_constant = own.lr_schedule == "constant" and own.warmup_steps > 0
    return {
        f"{prefix}.lr_scheduler_type": "cosine" if warm_constant else own.lr_schedule,
        f"{prefix}.num_cycles": 0.0 if warm_constant else 0.5,
        f"{prefix}.zero_indexed_step": not warm_constant,
    }


def batches(config: AstunerConfig) -> Settings:
    """Micro-batches by tokens; one that holds a single sequence must hold the longest."""
    own = config.trainer_common
    tokens = max(own.micro_batch_tokens, longest(config), PADDING_TOKENS)
    return {
        f"{ACTOR}.strategy": "fsdp2",
        f"{ACTOR}.fsdp_config.strategy": "fsdp2",
        f"{REF}.fsdp_config.strategy": "fsdp2",
        f"{ACTOR}.ppo_epochs": 1,
        f"{ACTOR}.ppo_mini_batch_size": max(1, config.data.train_batch_size // own.mini_batch_num),
        f"{ACTOR}.shuffle": False,
        f"{ACTOR}.use_dynamic_bsz": True,
        f"{ACTOR}.ppo_max_token_len_per_gpu": tokens,
        f"{ROLLOUT}.log_prob_use_dynamic_bsz": True,
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu": tokens,
        f"{REF}.log_prob_use_dynamic_bsz": True,
        f"{REF}.log_prob_max_token_len_per_gpu": tokens,
    }


def compilation(device: Device) -> Settings:
    if device == "cuda":
        return {}
    return {f"{ACTOR}.use_torch_compile": False, f"{ACTOR}.fsdp_config.use_torch_compile": False}
