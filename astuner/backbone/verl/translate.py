"""Our configuration as verl's: `to_verl`, and the same in words for `astuner explain`.

Pure and without verl. Every key of the schema is decided in `BECOMES`: the verl keys it
sets, or that astuner reads it itself. Raw settings (`astuner.verl`) are merged last and
win; `overridden` says over what. Whether verl knows a key is `compose`'s to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from astuner.backbone import overriding
from astuner.backbone.overriding import announced, pair
from astuner.backbone.spawned.choices import Device, Facts, assumed
from astuner.backbone.translation import Translation
from astuner.backbone.verl import learning, sections
from astuner.backbone.verl.limits import check, notes, problems
from astuner.backbone.verl.sections import ACTOR, MODEL, REF, ROLLOUT, Settings
from astuner.config.keys import keys
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError

__all__ = [
    "becomes",
    "check",
    "notes",
    "overridden",
    "raw",
    "to_verl",
    "translation",
    "warnings",
]

raw = sections.raw

ITSELF = "read by astuner itself"
_OPTIM = f"{ACTOR}.optim"
_CLIP = (f"{ACTOR}.clip_ratio_low", f"{ACTOR}.clip_ratio_high")
_CORRECTION = "algorithm.rollout_correction"
_SAMPLER = "trainer.v1.sampler"

BECOMES: Mapping[str, tuple[str, ...]] = {
    "project_name": ("trainer.project_name",),
    "experiment_name": ("trainer.experiment_name",),
    "experiment_dir": ("trainer.default_local_dir",),
    "seed": (f"{ROLLOUT}.seed",),
    "model.path": (f"{MODEL}.path",),
    "model.device": ("trainer.device",),
    "model.dtype": (
        f"{ROLLOUT}.dtype",
        f"{ACTOR}.fsdp_config.mixed_precision",
        f"{REF}.fsdp_config.mixed_precision",
    ),
    "model.lora.enable": (
        f"{MODEL}.lora_rank",
        f"{MODEL}.lora.merge",
        f"{ROLLOUT}.load_format",
    ),
    "model.lora.rank": (f"{MODEL}.lora_rank",),
    "model.lora.alpha": (f"{MODEL}.lora_alpha",),
    "model.lora.target_modules": (f"{MODEL}.target_modules",),
    "data.max_prompt_length": ("data.max_prompt_length", f"{ROLLOUT}.max_model_len"),
    "data.max_response_length": (
        "data.max_response_length",
        f"{ROLLOUT}.max_model_len",
        f"{ACTOR}.loss_scale_factor",
    ),
    "data.train_batch_size": ("data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size"),
    "rollout.num_repeat": (f"{ROLLOUT}.n",),
    "rollout.temperature": (f"{ROLLOUT}.temperature",),
    "rollout.top_p": (f"{ROLLOUT}.top_p",),
    "rollout.top_k": (f"{ROLLOUT}.top_k",),
    "rollout.max_model_len": (f"{ROLLOUT}.max_model_len",),
    "rollout.max_num_seqs": (f"{ROLLOUT}.max_num_seqs",),
    "rollout.kv_cache_tokens": (f"{ROLLOUT}.engine_kwargs.{sections.EMBEDDED}.kv_cache_tokens",),
    "rollout.max_env_worker": (f"{ROLLOUT}.agent.num_workers",),
    "rollout.max_staleness": (
        "trainer.v1.separate_async.num_warmup_batches",
        f"{_SAMPLER}.max_off_policy_threshold",
    ),
    "rollout.val_kwargs.temperature": (
        f"{ROLLOUT}.val_kwargs.temperature",
        f"{ROLLOUT}.val_kwargs.do_sample",
    ),
    "rollout.val_kwargs.top_p": (f"{ROLLOUT}.val_kwargs.top_p",),
    "rollout.val_kwargs.top_k": (f"{ROLLOUT}.val_kwargs.top_k",),
    "rollout.val_kwargs.num_repeat": (f"{ROLLOUT}.val_kwargs.n",),
    "rollout.tensor_model_parallel_size": (f"{ROLLOUT}.tensor_model_parallel_size",),
    "rollout.mode": (
        "trainer.v1.trainer_mode",
        f"{ROLLOUT}.checkpoint_engine.backend",
        f"{ROLLOUT}.checkpoint_engine.custom_backend_module",
        "actor_rollout_ref.hybrid_engine",
        f"{_SAMPLER}.max_off_policy_strategy",
    ),
    "rollout.engine": (f"{ROLLOUT}.name",),
    "rollout.nnodes": (f"{ROLLOUT}.nnodes",),
    "rollout.n_gpus_per_node": (f"{ROLLOUT}.n_gpus_per_node",),
    "rollout.gpu_memory_utilization": (f"{ROLLOUT}.gpu_memory_utilization",),
    "trainer_common.total_epochs": ("trainer.total_training_steps",),
    "trainer_common.total_steps": ("trainer.total_training_steps",),
    "trainer_common.save_freq": ("trainer.save_freq",),
    "trainer_common.resume_freq": ("trainer.save_freq",),
    "trainer_common.keep_checkpoints": ("trainer.checkpoint_callback_class",),
    "trainer_common.test_freq": ("trainer.test_freq",),
    "trainer_common.val_before_train": ("trainer.val_before_train",),
    "trainer_common.algorithm.adv_estimator": ("algorithm.adv_estimator",),
    "trainer_common.algorithm.loss": (f"{ACTOR}.policy_loss.loss_mode", *_CLIP),
    "trainer_common.algorithm.clip_ratio_low": _CLIP[:1],
    "trainer_common.algorithm.clip_ratio_high": _CLIP[1:],
    "trainer_common.algorithm.loss_agg_mode": (
        f"{ACTOR}.loss_agg_mode",
        f"{ACTOR}.loss_scale_factor",
    ),
    "trainer_common.algorithm.tis_cap": (
        f"{_CORRECTION}.rollout_is",
        f"{_CORRECTION}.rollout_is_threshold",
        f"{_CORRECTION}.bypass_mode",
    ),
    "trainer_common.optim.lr": (f"{_OPTIM}.lr",),
    "trainer_common.optim.lr_schedule": (
        f"{_OPTIM}.lr_scheduler_type",
        f"{_OPTIM}.num_cycles",
    ),
    "trainer_common.optim.warmup_steps": (
        f"{_OPTIM}.lr_warmup_steps",
        f"{_OPTIM}.zero_indexed_step",
    ),
    "trainer_common.optim.betas": (f"{_OPTIM}.betas",),
    "trainer_common.optim.weight_decay": (f"{_OPTIM}.weight_decay",),
    "trainer_common.optim.max_grad_norm": (f"{_OPTIM}.clip_grad",),
    "trainer_common.mini_batch_num": (
        f"{ACTOR}.ppo_mini_batch_size",
        "trainer.v1.separate_async.parameter_sync_step",
    ),
    "trainer_common.micro_batch_tokens": (
        f"{ACTOR}.ppo_max_token_len_per_gpu",
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
        f"{REF}.log_prob_max_token_len_per_gpu",
    ),
    "trainer_common.gradient_checkpointing": (f"{MODEL}.enable_gradient_checkpointing",),
    "trainer_common.use_kl_loss": (f"{ACTOR}.use_kl_loss",),
    "trainer_common.kl_loss_coef": (f"{ACTOR}.kl_loss_coef",),
    "trainer_common.kl_loss_type": (f"{ACTOR}.kl_loss_type",),
    "trainer_common.nnodes": ("trainer.nnodes",),
    "trainer_common.n_gpus_per_node": ("trainer.n_gpus_per_node",),
    "trainer_common.device": ("trainer.device",),
}
"""Which verl keys a key sets, alone or with others. Some are set in one mode only."""

READ_HERE: tuple[str, ...] = (
    "backbone",
    "env.",
    "model.renderer",
    "model.template_kwargs",
    "rollout.user_workflow",
    "rollout.allow_biased_sampling",
    "rollout.max_response_length_in_one_turn",
    "rollout.episode_timeout",
    "rollout.call_timeout",
    "rollout.judge_timeout",
    "rollout.max_retries",
    "rollout.multi_turn.max_steps",
    "rollout.val_kwargs.max_tasks",
    "task_reader.",
    "task_judge.",
    "context_tracker.",
    "model_tuner.",
    "trainer_common.algorithm.dynamic_sampling",
    "trainer_common.algorithm.max_refill_rounds",
    "trainer_common.logger",
    "trainer_common.ray_address",
    "trainer_common.stall_timeout",
)
"""Keys, or sections, that the launcher and the agent loop read as they are."""
UNUSED: Mapping[str, str] = {
    "rollout.kv_cache_tokens": "the engine sizes its cache by rollout.gpu_memory_utilization",
    "rollout.max_staleness": "verl takes turns unless rollout.mode is async",
}
"""Why a key sets nothing, in the modes where it does not."""
REMARKS: Mapping[str, str] = {
    "model.device": "auto takes the CPU where no GPU is visible",
    "trainer_common.device": "auto takes the CPU where no GPU is visible",
    "seed": "the adapter's start is verl's own",
    "trainer_common.algorithm.max_refill_rounds": (
        "groups that are then still without variance count as zeros in verl's mean"
    ),
    "trainer_common.algorithm.loss_agg_mode": "failed episodes count as zeros in verl's mean",
    "trainer_common.mini_batch_num": (
        "verl takes a further optimizer step for every ppo_mini_batch_size * num_repeat timelines "
        "more, where episodes fall into several"
    ),
}
"""In what verl differs a little, whatever it is set to."""
RAW = "verl"


def to_verl(
    config: AstunerConfig,
    *,
    run_dir: Path,
    device: Device,
    resume: bool = False,
    facts: Facts = Facts(),  # noqa: B008 (frozen)
) -> Settings:
    """Flat dotted verl keys and their values, raw settings included.

    Raises ConfigError when verl cannot honour the configuration.
    """
    check(config, device)
    return translated(config, run_dir, device, facts, resume=resume) | raw(config)


def translated(
    config: AstunerConfig, run_dir: Path, device: Device, facts: Facts, *, resume: bool = False
) -> Settings:
    """The same without the raw settings, and unchecked."""
    return {
        **sections.cluster(config, device),
        **sections.model(config, device, facts),
        **sections.precision(config, device),
        **sections.data(config),
        **sections.rollout(config, device, facts),
        **sections.mode(config, device),
        **learning.algorithm(config),
        **learning.optimizer(config),
        **learning.batches(config),
        **learning.compilation(device),
        **sections.schedule(config, run_dir, facts, resume=resume),
    }


# ---------------------------------------------------------------- raw settings


def overridden(config: AstunerConfig, device: Device | None = None) -> dict[str, tuple[Any, Any]]:
    """verl's keys that a raw setting changes: what they would be, and what they are."""
    return overriding.overridden(_shown(config, device), raw(config))


# ---------------------------------------------------------------- in words


def translation(config: AstunerConfig) -> Translation:
    """The translation for the device that the configuration names; for GPUs if it names none."""
    named = {key for of_key in BECOMES.values() for key in of_key}
    everything = _shown(config, None)
    refused = [f"`astuner.{key}` {message}" for key, message in problems(config)]
    unchecked, unknown = _known_to_verl(raw(config))
    return Translation(
        becomes(config),
        {key: value for key, value in everything.items() if key not in named},
        (*warnings(config), *unchecked),
        (*refused, *unknown),
    )


def _known_to_verl(settings: Settings) -> tuple[list[str], list[str]]:
    """A note that this cannot be seen here, or what is wrong. Slow, where there is something to
    see: verl is imported."""
    if not settings:
        return [], []
    if find_spec("verl") is None:
        return ["Whether verl knows what is under `astuner.verl` shows where it is installed."], []
    from astuner.backbone.verl.compose import compose

    try:
        compose(settings, validate=False)
    except ConfigError as error:
        return [], [str(error)]
    return [], []


def becomes(config: AstunerConfig) -> Mapping[str, str]:
    """What each key becomes: "verl: KEY=VALUE, ...", "read by astuner itself" or ""."""
    settings = _shown(config, None)
    replaced = overridden(config)
    return {name: _in_words(name, settings, replaced, config) for name in keys()}


def _in_words(
    name: str, settings: Settings, replaced: Mapping[str, tuple[Any, Any]], config: AstunerConfig
) -> str:
    if name == RAW:
        pairs = [pair(key, value, replaced, RAW) for key, value in raw(config).items()]
        return f"verl: {', '.join(pairs)}" if pairs else "nothing"
    remark = f" ({REMARKS[name]})" if name in REMARKS else ""
    if any(name == key or (key[-1] == "." and name.startswith(key)) for key in READ_HERE):
        return f"{ITSELF}{remark}"
    pairs = [
        pair(key, settings[key], replaced, RAW) for key in BECOMES.get(name, ()) if key in settings
    ]
    if pairs:
        return f"verl: {', '.join(pairs)}{remark}"
    return f"not used ({UNUSED[name]})" if name in UNUSED else ""


def warnings(config: AstunerConfig, device: Device | None = None) -> list[str]:
    """What a run says before it starts: what verl does a little otherwise, and which of
    astuner's settings are overridden."""
    return [*notes(config, device), *announced(overridden(config, device), RAW)]


def _shown(config: AstunerConfig, device: Device | None) -> Settings:
    run_dir = Path(config.experiment_dir) / config.experiment_name
    return translated(config, run_dir, device or assumed(config), Facts())
