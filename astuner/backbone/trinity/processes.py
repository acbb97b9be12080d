"""What Trinity's processes are told, as in `sections`: GPUs, explorer, trainer, weight sync."""

from __future__ import annotations

import math

from astuner.backbone.spawned.choices import NEVER, Facts, save_every
from astuner.backbone.trinity.sections import (
    NO_LIMIT,
    Route,
    Settings,
    engines,
    is_async,
    is_colocated,
    longest,
    max_staleness,
)
from astuner.config.schema import AstunerConfig

RUNNERS = 8
"""Processes that run groups of episodes, for each inference engine on GPUs."""
RUNNERS_HERE = 2
"""Likewise beside a service, which may be on this very machine."""


def cluster(config: AstunerConfig, way: Route) -> Settings:
    """GPUs: those of the trainer and those of the rollouts, on machines that are alike."""
    trainer, rollout = config.trainer_common, config.rollout
    settings: Settings = {"cluster.ray_address": trainer.ray_address or "auto"}
    if way == "service":
        return settings | {"cluster.node_num": 1, "cluster.gpu_per_node": 1}  # not looked at
    if is_colocated(config):
        return settings | {"cluster.node_num": 1, "cluster.gpu_per_node": 1}
    if trainer.nnodes == rollout.nnodes == 1:
        both = trainer.n_gpus_per_node + rollout.n_gpus_per_node
        return settings | {"cluster.node_num": 1, "cluster.gpu_per_node": both}
    return settings | {
        "cluster.node_num": trainer.nnodes + rollout.nnodes,
        "cluster.gpu_per_node": trainer.n_gpus_per_node,
    }


def explorer(config: AstunerConfig, way: Route, facts: Facts) -> Settings:
    own, prefix = config.rollout, "explorer.rollout_model"
    settings: Settings = {
        "explorer.runner_per_model": runners(config, way),
        "explorer.concurrent_mode": "asynchronous",
        "explorer.max_timeout": group_timeout(config),
        "explorer.max_retry_times": 0,  # astuner tries again itself
        "explorer.eval_interval": eval_every(config),
        "explorer.eval_on_startup": config.trainer_common.val_before_train and facts.validation,
        f"{prefix}.seed": config.seed,
    }
    if way == "service":
        return settings | {f"{prefix}.engine_type": "tinker", f"{prefix}.engine_num": 1}
    return settings | {
        f"{prefix}.engine_type": "vllm",
        f"{prefix}.engine_num": engines(config),
        f"{prefix}.tensor_parallel_size": own.tensor_model_parallel_size,
        f"{prefix}.gpu_memory_utilization": own.gpu_memory_utilization,
        f"{prefix}.dtype": "float32" if config.model.dtype == "float32" else "bfloat16",
        f"{prefix}.enable_openai_api": True,  # token ids go to its completions endpoint
        f"{prefix}.enable_history": False,
        f"{prefix}.extra_engine_args": {"max_num_seqs": own.max_num_seqs},
    }


def runners(config: AstunerConfig, way: Route) -> int:
    """Processes for each engine, each with one group at a time; at most as many as there are
    groups, or as `max_env_worker` episodes make."""
    count = engines(config) if way == "vllm" else 1
    allowed = config.rollout.max_env_worker // config.rollout.num_repeat // count
    groups = math.ceil(config.data.train_batch_size / count)
    return max(1, min(RUNNERS if way == "vllm" else RUNNERS_HERE, groups, allowed))


def group_timeout(config: AstunerConfig) -> int:
    """Seconds after which Trinity gives a group up; astuner has given up each episode before.
    In turns a group may first wait for the trainer (`served_weights`)."""
    own = config.rollout
    attempts = 1 + own.max_retries
    played = attempts * (own.episode_timeout + own.judge_timeout) + own.call_timeout
    waited = 0 if is_async(config) else config.trainer_common.stall_timeout
    return math.ceil(played + waited)


def eval_every(config: AstunerConfig) -> int:
    """A multiple of the steps between weight syncs, or Trinity would round it down."""
    interval = sync_interval(config)
    wanted = config.trainer_common.test_freq or NEVER
    return math.ceil(wanted / interval) * interval


def trainer(config: AstunerConfig, way: Route, facts: Facts) -> Settings:
    own = config.trainer_common
    settings: Settings = {
        "trainer.trainer_type": "tinker" if way == "service" else "verl",
        "trainer.total_steps": facts.total_steps or own.total_steps or None,
        "trainer.save_interval": save_every(config),
        "trainer.grad_clip": own.optim.max_grad_norm,
    }
    if way == "service":
        return settings
    return settings | {
        "trainer.grad_clip": own.optim.max_grad_norm or NO_LIMIT,
        "trainer.trainer_strategy": "fsdp2",
        "trainer.save_hf_checkpoint": "last",
        "trainer.use_dynamic_bsz": True,
        "trainer.use_remove_padding": facts.flash_attention,
        "trainer.max_token_len_per_gpu": max(
            own.micro_batch_tokens, longest(config, facts.model_context)
        ),
        "trainer.trainer_config": _verl(config, facts),
    }


def _verl(config: AstunerConfig, facts: Facts) -> Settings:
    """What only verl's own part of Trinity's configuration can say (trainer/verl/config.py:143)."""
    kind = "fp32" if config.model.dtype == "float32" else "bf16"
    mixed = {"param_dtype": kind, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    attention = (
        {} if facts.flash_attention else {"override_config": {"attn_implementation": "sdpa"}}
    )
    warm = config.trainer_common.optim.warmup_steps > 0
    optim: Settings = {"zero_indexed_step": True}
    if warm and config.trainer_common.optim.lr_schedule == "constant":
        # verl's constant schedule wastes its first warm-up step on a rate of 0; its cosine
        # over no cycles is constant too, and can count from 1
        optim = {"lr_scheduler_type": "cosine", "num_cycles": 0.0, "zero_indexed_step": False}
    return {
        "model": {
            "enable_gradient_checkpointing": config.trainer_common.gradient_checkpointing,
            **attention,
        },
        "actor": {"fsdp_config": {"mixed_precision": mixed}, "optim": optim},
        "ref": {"fsdp_config": {"mixed_precision": mixed}},
    }


def synchronizer(config: AstunerConfig, way: Route) -> Settings:
    """With `explorer_driven` the explorer asks for weights after each batch and waits until the
    step in progress is done, so a batch is trained one version after it was sampled; with
    `fixed` it waits until its own batch is trained."""
    return {
        "synchronizer.sync_method": _method(config, way),
        "synchronizer.sync_style": "explorer_driven" if is_async(config) else "fixed",
        "synchronizer.sync_interval": sync_interval(config),
        "synchronizer.sync_offset": 0,
        "synchronizer.sync_timeout": math.ceil(config.trainer_common.stall_timeout),
    }


def _method(config: AstunerConfig, way: Route) -> str:
    """On a service "memory" hands over the name of the sampler's weights. With "checkpoint" the
    trainer leaves the sync out in a step that it saves (trainer/trainer.py:139), but a
    service's save has no weights for the sampler (trainer/tinker/tinker_trainer.py:338), so
    the explorer would wait for them until its time-out."""
    if way == "service":
        return "memory"
    if config.model.lora.enable:
        return "checkpoint"
    return "memory" if is_colocated(config) else "nccl"


def sync_interval(config: AstunerConfig) -> int:
    """Batches between two weight syncs. Of n batches the last lags 2n - 1 versions."""
    return max(1, (max_staleness(config) + 1) // 2)
