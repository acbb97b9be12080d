"""For every key of the schema what becomes of it under verl, as `astuner explain` shows it.

The values are made in `sections` and `learning`; a test holds both against each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from astuner.backbone.spawned.explaining import Table
from astuner.backbone.verl import sections
from astuner.backbone.verl.sections import ACTOR, MODEL, REF, ROLLOUT

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
        "groups that are then still without variance count as zeros in verl's mean; each of verl's "
        "processes may replace its share of them"
    ),
    "trainer_common.algorithm.loss_agg_mode": "failed episodes count as zeros in verl's mean",
    "trainer_common.mini_batch_num": (
        "verl takes a further optimizer step for every ppo_mini_batch_size * num_repeat timelines "
        "more, where episodes fall into several"
    ),
}
"""In what verl differs a little, whatever it is set to."""

TABLE = Table(
    "verl",
    BECOMES,
    READ_HERE,
    {name: f"not used ({why})" for name, why in UNUSED.items()},
    REMARKS,
)
