"""What Trinity's configuration is told, section by section: pure functions from ours to theirs.

Each returns flat dotted keys of Trinity's own `Config` with plain values. What Trinity
cannot do at all is refused by `limits`, so nothing here checks. Trinity is not imported;
file and line numbers in comments are those of Trinity-RFT 0.6.0.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from astuner.backbone.lora_parts import lora_parts
from astuner.backbone.overriding import flat
from astuner.backbone.spawned.choices import NEVER, Device, Facts
from astuner.config.schema import AstunerConfig

Route = Literal["service", "vllm"]
"""Who samples and trains: astuner's service over the Tinker protocol, or Trinity's own vLLM
and verl."""
Settings = dict[str, Any]

PACKAGE = "astuner.backbone.trinity"
WORKFLOW = f"{PACKAGE}.workflow.EpisodeWorkflow"
MONITOR = f"{PACKAGE}.monitor.Lines"
FOLDER = "trinity"
"""Of everything the run's processes share, in the run's folder."""
CHECKPOINTS = ("checkpoints", "trinity")
"""Trinity's `project` and `name`: the folders of its checkpoints, and what it calls them on a
service. The run's own names may hold what a service takes for no name."""

NO_LIMIT = 1e9
"""Above any gradient's norm."""


# ---------------------------------------------------------------- choices


def route(config: AstunerConfig, device: Device) -> Route:
    chosen = config.rollout.engine
    if chosen in ("service", "vllm"):
        return chosen
    return "vllm" if device == "cuda" else "service"


def is_async(config: AstunerConfig) -> bool:
    """Whether rollouts go on during training; unlike elsewhere they do unless told otherwise."""
    return config.rollout.mode != "sync"


def max_staleness(config: AstunerConfig) -> int:
    """Weight versions that a batch may lag behind when it is trained. To overlap at all
    takes one, which is what `rollout.mode: auto` makes of a 0."""
    return max(1, config.rollout.max_staleness) if is_async(config) else 0


def is_colocated(config: AstunerConfig) -> bool:
    """Trinity's mode for one GPU, which takes turns."""
    own = config.trainer_common
    return not is_async(config) and own.nnodes * own.n_gpus_per_node == 1


def engines(config: AstunerConfig) -> int:
    """Inference engines on GPUs of their own."""
    if is_colocated(config):
        return 1
    own = config.rollout
    return max(1, own.nnodes * own.n_gpus_per_node // own.tensor_model_parallel_size)


def trainer_gpus(config: AstunerConfig) -> int:
    return config.trainer_common.nnodes * config.trainer_common.n_gpus_per_node


def longest(config: AstunerConfig, context: int = 0) -> int:
    """Tokens of the longest sequence there can be."""
    whole = config.data.max_prompt_length + config.data.max_response_length
    return min(config.rollout.max_model_len or whole, whole, context or whole)


def tasks_folder(run_dir: Path, split: Literal["train", "validation"]) -> Path:
    """A folder with one JSON Lines file: a row {"index": i} for each task, in the order in
    which they are played."""
    return run_dir / FOLDER / "tasks" / split


# ---------------------------------------------------------------- sections


def general(config: AstunerConfig, run_dir: Path, way: Route, *, resume: bool) -> Settings:
    project, name = CHECKPOINTS
    colocated = way == "vllm" and is_colocated(config)
    return {
        "mode": "colocate" if colocated else "both",
        "project": project,
        "name": name,
        "checkpoint_root_dir": str(run_dir),
        "ray_namespace": "astuner-" + re.sub(r"\W+", "-", str(run_dir)).strip("-"),
        "continue_from_checkpoint": resume,
        "ignore_validator_suggestions": True,
        "monitor.monitor_type": MONITOR,
        "data_processor.experience_pipeline.save_input": False,
    }


def model(config: AstunerConfig, way: Route, facts: Facts, service_url: str | None) -> Settings:
    own, context = config.rollout, longest(config, facts.model_context)
    turn = max(1, min(own.max_response_length_in_one_turn, context - 1))
    settings: Settings = {
        "model.model_path": facts.model_path or config.model.path,
        "model.max_model_len": context,
        "model.max_prompt_tokens": context - turn,
        "model.max_response_tokens": turn,
        "model.enable_prompt_truncation": False,  # it would cut without a word
        "model.temperature": own.temperature,
        "model.top_p": own.top_p,
        "model.top_k": own.top_k or -1,
    }
    if way == "service":
        return settings | _tinker(config, service_url)
    if config.model.lora.enable:
        settings["model.lora_configs"] = [
            {
                "name": "astuner",
                "lora_rank": config.model.lora.rank,
                "lora_alpha": config.model.lora.alpha,
                "target_modules": config.model.lora.target_modules,
            }
        ]
    return settings


def _tinker(config: AstunerConfig, service_url: str | None) -> Settings:
    lora = config.model.lora
    return {
        "model.tinker.enable": True,
        "model.tinker.base_url": service_url,
        "model.tinker.rank": lora.rank,
        "model.tinker.seed": config.seed,
        **{f"model.tinker.{part}": on for part, on in lora_parts(lora.target_modules).items()},
    }


def buffer(config: AstunerConfig, run_dir: Path, facts: Facts) -> Settings:
    """The tasks go round without end: the trainer, which counts the steps, ends the run."""
    taskset = "buffer.explorer_input.taskset"
    own = config.data.train_batch_size
    settings: Settings = {
        "buffer.batch_size": own,
        "buffer.train_batch_size": own * config.rollout.num_repeat,
        "buffer.total_steps": NEVER,
        **{f"{taskset}.{key}": value for key, value in _taskset(run_dir, "train").items()},
        f"{taskset}.rollout_args.temperature": config.rollout.temperature,
        "buffer.trainer_input.experience_buffer.name": "astuner",
        "buffer.trainer_input.experience_buffer.storage_type": "queue",
        "buffer.trainer_input.experience_buffer.max_read_timeout": (
            config.trainer_common.stall_timeout
        ),
    }
    if facts.validation:
        settings["buffer.explorer_input.eval_tasksets"] = [_validation(config, run_dir)]
    return settings


def _taskset(run_dir: Path, split: Literal["train", "validation"]) -> Settings:
    return {
        "name": split,
        "storage_type": "file",
        "path": str(tasks_folder(run_dir, split)),
        "split": "train",  # as `datasets` calls the rows of a plain file
        "default_workflow_type": WORKFLOW,
        "workflow_args": {"folder": str(run_dir / FOLDER)},
    }


def _validation(config: AstunerConfig, run_dir: Path) -> Settings:
    val = config.rollout.val_kwargs
    return {
        **_taskset(run_dir, "validation"),
        "repeat_times": val.num_repeat,
        "rollout_args": {
            "temperature": val.temperature,
            "top_p": val.top_p,
            "top_k": val.top_k or -1,
        },
    }


# ---------------------------------------------------------------- raw settings


def raw(config: AstunerConfig) -> Settings:
    """`astuner.trinity` as flat dotted keys."""
    return flat(config.trinity, lists=True)
