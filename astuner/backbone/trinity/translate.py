"""Our configuration as Trinity's: `to_trinity`, and the same in words for `astuner explain`.

Pure and without Trinity. Every key of the schema is decided in `BECOMES`: the keys of
Trinity's `Config` that it sets, or that astuner reads it itself. Raw settings
(`astuner.trinity`) are merged last and win; `overridden` says over what. Whether Trinity
knows a key is `compose`'s to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astuner.backbone import overriding
from astuner.backbone.overriding import announced, pair
from astuner.backbone.spawned.choices import Device, Facts, assumed
from astuner.backbone.translation import Translation
from astuner.backbone.trinity import learning, processes, sections
from astuner.backbone.trinity.compose import looked_up
from astuner.backbone.trinity.limits import check, notes, problems
from astuner.backbone.trinity.sections import Settings
from astuner.config.keys import keys
from astuner.config.schema import AstunerConfig

__all__ = [
    "becomes",
    "check",
    "notes",
    "overridden",
    "raw",
    "route",
    "to_trinity",
    "translation",
    "warnings",
]

flat, raw, route = sections.flat, sections.raw, sections.route

ITSELF = "read by astuner itself"
_MODEL, _ENGINE = "model", "explorer.rollout_model"
_LOSS, _OPTIM = "algorithm.policy_loss_fn_args", "algorithm.optimizer"
_LORA, _TINKER = "model.lora_configs.0", "model.tinker"
_LENGTHS = ("model.max_model_len", "model.max_prompt_tokens", "model.max_response_tokens")
_TASKS, _VALIDATION = "buffer.explorer_input.taskset", "buffer.explorer_input.eval_tasksets.0"
_BATCHES = "algorithm.sample_strategy_args"
_VERL = "trainer.trainer_config"
_SCHEDULE = tuple(
    f"{_VERL}.actor.optim.{key}" for key in ("lr_scheduler_type", "num_cycles", "zero_indexed_step")
)
_PRECISION = tuple(
    f"{_VERL}.{part}.fsdp_config.mixed_precision.param_dtype" for part in ("actor", "ref")
)

BECOMES: Mapping[str, tuple[str, ...]] = {
    "experiment_dir": ("checkpoint_root_dir",),
    "experiment_name": ("checkpoint_root_dir",),
    "seed": (f"{_ENGINE}.seed", f"{_TINKER}.seed"),
    "model.path": ("model.model_path",),
    "model.device": ("trainer.trainer_type",),
    "model.dtype": (f"{_ENGINE}.dtype", *_PRECISION),
    "model.lora.enable": (f"{_LORA}.name", f"{_TINKER}.enable"),
    "model.lora.rank": (f"{_LORA}.lora_rank", f"{_TINKER}.rank"),
    "model.lora.alpha": (f"{_LORA}.lora_alpha",),
    "model.lora.target_modules": (
        f"{_LORA}.target_modules",
        f"{_TINKER}.train_mlp",
        f"{_TINKER}.train_attn",
        f"{_TINKER}.train_unembed",
    ),
    "data.max_prompt_length": _LENGTHS[:2],
    "data.max_response_length": _LENGTHS[:2],
    "data.train_batch_size": (
        "buffer.batch_size",
        "buffer.train_batch_size",
        f"{_BATCHES}.multiple_of",
        "explorer.runner_per_model",
    ),
    "rollout.num_repeat": (
        "algorithm.repeat_times",
        "buffer.train_batch_size",
        f"{_BATCHES}.multiple_of",
        "explorer.runner_per_model",
    ),
    "rollout.temperature": (
        "model.temperature",
        f"{_TASKS}.rollout_args.temperature",
    ),
    "rollout.top_p": ("model.top_p",),
    "rollout.top_k": ("model.top_k",),
    "rollout.max_response_length_in_one_turn": _LENGTHS[1:],
    "rollout.max_model_len": _LENGTHS[:2],
    "rollout.max_num_seqs": (f"{_ENGINE}.extra_engine_args.max_num_seqs",),
    "rollout.max_env_worker": ("explorer.runner_per_model",),
    "rollout.max_staleness": (f"{_BATCHES}.max_staleness", "synchronizer.sync_interval"),
    "rollout.episode_timeout": ("explorer.max_timeout",),
    "rollout.call_timeout": ("explorer.max_timeout",),
    "rollout.judge_timeout": ("explorer.max_timeout",),
    "rollout.max_retries": ("explorer.max_timeout",),
    "rollout.val_kwargs.temperature": (f"{_VALIDATION}.rollout_args.temperature",),
    "rollout.val_kwargs.top_p": (f"{_VALIDATION}.rollout_args.top_p",),
    "rollout.val_kwargs.top_k": (f"{_VALIDATION}.rollout_args.top_k",),
    "rollout.val_kwargs.num_repeat": (f"{_VALIDATION}.repeat_times",),
    "rollout.tensor_model_parallel_size": (f"{_ENGINE}.tensor_parallel_size",),
    "rollout.mode": ("synchronizer.sync_style", "mode", "synchronizer.sync_method"),
    "rollout.engine": (f"{_ENGINE}.engine_type", "trainer.trainer_type", "model.tinker.enable"),
    "rollout.nnodes": ("cluster.node_num", f"{_ENGINE}.engine_num"),
    "rollout.n_gpus_per_node": ("cluster.gpu_per_node", f"{_ENGINE}.engine_num"),
    "rollout.gpu_memory_utilization": (f"{_ENGINE}.gpu_memory_utilization",),
    "trainer_common.total_epochs": ("trainer.total_steps",),
    "trainer_common.total_steps": ("trainer.total_steps",),
    "trainer_common.save_freq": ("trainer.save_interval",),
    "trainer_common.resume_freq": ("trainer.save_interval",),
    "trainer_common.test_freq": ("explorer.eval_interval",),
    "trainer_common.val_before_train": ("explorer.eval_on_startup",),
    "trainer_common.algorithm.loss": (f"{_LOSS}.loss",),
    "trainer_common.algorithm.clip_ratio_low": (f"{_LOSS}.clip_low",),
    "trainer_common.algorithm.clip_ratio_high": (f"{_LOSS}.clip_high",),
    "trainer_common.algorithm.tis_cap": (f"{_LOSS}.tis_cap",),
    "trainer_common.optim.lr": (f"{_OPTIM}.lr",),
    "trainer_common.optim.lr_schedule": (f"{_OPTIM}.lr_scheduler_type", *_SCHEDULE),
    "trainer_common.optim.warmup_steps": (f"{_OPTIM}.lr_warmup_steps", *_SCHEDULE),
    "trainer_common.optim.betas": (f"{_OPTIM}.betas",),
    "trainer_common.optim.weight_decay": (f"{_OPTIM}.weight_decay",),
    "trainer_common.optim.max_grad_norm": (f"{_OPTIM}.clip_grad", "trainer.grad_clip"),
    "trainer_common.micro_batch_tokens": ("trainer.max_token_len_per_gpu",),
    "trainer_common.gradient_checkpointing": (f"{_VERL}.model.enable_gradient_checkpointing",),
    "trainer_common.use_kl_loss": (f"{_LOSS}.kl_type",),
    "trainer_common.kl_loss_coef": (f"{_LOSS}.kl_coef",),
    "trainer_common.kl_loss_type": (f"{_LOSS}.kl_type",),
    "trainer_common.nnodes": ("cluster.node_num", f"{_LOSS}.processes"),
    "trainer_common.n_gpus_per_node": ("cluster.gpu_per_node", f"{_LOSS}.processes"),
    "trainer_common.device": ("trainer.trainer_type",),
    "trainer_common.ray_address": ("cluster.ray_address",),
    "trainer_common.stall_timeout": (
        "synchronizer.sync_timeout",
        "explorer.max_timeout",
        "buffer.trainer_input.experience_buffer.max_read_timeout",
    ),
}
"""Which of Trinity's keys a key sets, alone or with others. Some are set on one route only."""

READ_HERE: tuple[str, ...] = (
    "project_name",
    "backbone",
    "model.renderer",
    "model.template_kwargs",
    "rollout.user_workflow",
    "rollout.allow_biased_sampling",
    "rollout.kv_cache_tokens",
    "rollout.multi_turn.max_steps",
    "rollout.val_kwargs.max_tasks",
    "task_reader.",
    "task_judge.",
    "env.",
    "context_tracker.",
    "model_tuner.",
    "trainer_common.algorithm.adv_estimator",
    "trainer_common.algorithm.loss_agg_mode",
    "trainer_common.logger",
    "trainer_common.keep_checkpoints",
)
"""Keys, or sections, that the launcher, the service it starts and the workflow read as they
are."""
UNUSED: Mapping[str, str] = {
    "trainer_common.algorithm.dynamic_sampling": "Trinity does not replace groups",
    "trainer_common.algorithm.max_refill_rounds": "Trinity does not replace groups",
    "trainer_common.mini_batch_num": "Trinity takes one optimizer step for each batch",
}
"""Why a key sets nothing."""
BY_THE_SERVICE = (
    "model.dtype",
    "model.lora.alpha",
    "rollout.max_num_seqs",
    "trainer_common.micro_batch_tokens",
    "trainer_common.gradient_checkpointing",
)
"""Keys that Trinity has on GPUs, and that go into the service's own configuration otherwise."""
NO_GPUS = "the service takes what device it finds"
REMARKS: Mapping[str, str] = {
    "trainer_common.optim.lr": "Adam's epsilon is Trinity's: 1e-12 on a service, 1e-8 with verl",
    "trainer_common.optim.betas": (
        "a batch of which nothing is to be learnt still moves the weights by what Adam remembers; "
        "with the local backbone it is no step"
    ),
    "trainer_common.use_kl_loss": "Trinity asks the reference model in every step either way",
    "data.train_batch_size": (
        "where episodes fall into several timelines, verl's trainer takes a further optimizer step "
        "for every buffer.train_batch_size rows more"
    ),
    "trainer_common.test_freq": "counted in batches played; the last one is validated afterwards",
}
"""In what Trinity differs a little, whatever it is set to."""
RAW = "trinity"


def to_trinity(
    config: AstunerConfig,
    *,
    run_dir: Path,
    service_url: str | None,
    device: Device,
    resume: bool = False,
    facts: Facts = Facts(),  # noqa: B008 (frozen)
) -> Settings:
    """Flat dotted keys of Trinity's `Config` and their values, raw settings included.

    `service_url` is where the service that `route` asks for listens; None with "vllm".
    Raises ConfigError when Trinity cannot honour the configuration.
    """
    check(config, device)
    return translated(config, run_dir, service_url, device, facts, resume=resume) | raw(config)


def translated(
    config: AstunerConfig,
    run_dir: Path,
    service_url: str | None,
    device: Device,
    facts: Facts,
    *,
    resume: bool = False,
) -> Settings:
    """The same without the raw settings, and unchecked."""
    way = route(config, device)
    told = {
        **sections.general(config, run_dir, way, resume=resume),
        **sections.model(config, way, facts, service_url),
        **processes.cluster(config, way),
        **sections.buffer(config, run_dir, facts),
        **processes.explorer(config, way, facts),
        **processes.trainer(config, way, facts),
        **processes.synchronizer(config, way),
        **learning.algorithm(config, way),
        **learning.optimizer(config),
    }
    return flat(told)


# ---------------------------------------------------------------- raw settings


def overridden(config: AstunerConfig, device: Device | None = None) -> dict[str, tuple[Any, Any]]:
    """Trinity's keys that a raw setting changes: what they would be, and what they are."""
    return overriding.overridden(_shown(config, device), raw(config))


# ---------------------------------------------------------------- in words


def translation(config: AstunerConfig) -> Translation:
    """The translation for the device that the configuration names; for GPUs if it names none."""
    named = {key for of_key in BECOMES.values() for key in of_key}
    everything = _shown(config, None)
    refused = [f"`astuner.{key}` {message}" for key, message in problems(config)]
    unchecked, unknown = looked_up(raw(config))
    return Translation(
        becomes(config),
        {key: value for key, value in everything.items() if key not in named},
        (*warnings(config), *unchecked),
        (*refused, *unknown),
    )


def becomes(config: AstunerConfig) -> Mapping[str, str]:
    """What each key becomes: "trinity: KEY=VALUE, ...", "read by astuner itself" or ""."""
    settings = _shown(config, None)
    replaced = overridden(config)
    return {name: _in_words(name, settings, replaced, config) for name in keys()}


def _in_words(
    name: str, settings: Settings, replaced: Mapping[str, tuple[Any, Any]], config: AstunerConfig
) -> str:
    if name == RAW:
        pairs = [pair(key, value, replaced, RAW) for key, value in raw(config).items()]
        return f"trinity: {', '.join(pairs)}" if pairs else "nothing"
    if any(name == key or (key[-1] == "." and name.startswith(key)) for key in READ_HERE):
        return ITSELF
    pairs = [
        pair(key, settings[key], replaced, RAW) for key in BECOMES.get(name, ()) if key in settings
    ]
    if pairs:
        remark = f" ({REMARKS[name]})" if name in REMARKS else ""
        return f"trinity: {', '.join(pairs)}{remark}"
    if name in BY_THE_SERVICE:
        return "of the service that is started with the run"
    if name in BECOMES:
        return f"not used ({NO_GPUS})"
    return f"not used ({UNUSED[name]})" if name in UNUSED else ""


def warnings(config: AstunerConfig, device: Device | None = None) -> list[str]:
    """What a run says before it starts: what Trinity does a little otherwise, and which of
    astuner's settings are overridden."""
    return [*notes(config, device), *announced(overridden(config, device), RAW)]


def _shown(config: AstunerConfig, device: Device | None) -> Settings:
    run_dir = Path(config.experiment_dir) / config.experiment_name
    return translated(config, run_dir, None, device or assumed(config), Facts())
