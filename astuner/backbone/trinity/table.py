"""For every key of the schema what becomes of it under Trinity, as `astuner explain` shows it.

The values are made in `sections`, `processes` and `learning`; a test holds both against
each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from astuner.backbone.spawned.explaining import Table

_ENGINE = "explorer.rollout_model"
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
NO_GPUS = "not used (the service takes what device it finds)"
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

TABLE = Table(
    "trinity",
    BECOMES,
    READ_HERE,
    {
        **dict.fromkeys(BECOMES, NO_GPUS),
        **dict.fromkeys(BY_THE_SERVICE, "of the service that is started with the run"),
        **{name: f"not used ({why})" for name, why in UNUSED.items()},
    },
    REMARKS,
)
