"""verl's settings that `astuner.verl` may not change: those that astuner's own parts stand on.

Every other raw setting wins over the translation. With one of these the run would break, or
report something else than it does, and mostly without a word; the message names what to set
instead. Only compares keys; no verl here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from astuner.backbone import verl_cpu
from astuner.backbone.spawned.choices import Problem
from astuner.backbone.spawned.files import FOLDER_VARIABLE

NEEDED: Mapping[str, tuple[Any, str]] = {
    "trainer.use_v1": (True, "only this trainer of verl's takes episodes of several timelines"),
    "actor_rollout_ref.rollout.calculate_log_probs": (
        True,
        "a token is trained with the logprob that it was sampled with",
    ),
    "trainer.v1.sampler.sync_refill_failed_groups": (
        True,
        "groups without two good episodes are replaced",
    ),
    "algorithm.use_kl_in_reward": (
        False,
        "astuner's advantages are final. Use `astuner.trainer_common.use_kl_loss`",
    ),
}
"""Setting -> the one value that works, and why."""

_ENVIRONMENT = "ray_kwargs.ray_init.runtime_env.env_vars"
_AGENT, _WORKFLOW = "actor_rollout_ref.rollout", "episodes are those of your workflow"
INSTEAD: Mapping[str, str] = {
    "data": "tasks, lengths and the batch are `astuner.task_reader` and `astuner.data`",
    "reward": "rewards are those of your workflow or `astuner.task_judge`",
    "reward_model": "rewards are those of your workflow or `astuner.task_judge`",
    "custom_reward_function": "use `astuner.task_judge` with judge_type customized_protocol",
    f"{_AGENT}.agent.agent_loop_config_path": f"{_WORKFLOW}, `astuner.rollout.user_workflow`",
    f"{_AGENT}.agent.agent_loop_manager_class": f"{_WORKFLOW}, `astuner.rollout.user_workflow`",
    f"{_AGENT}.agent.default_agent_loop": f"{_WORKFLOW}, `astuner.rollout.user_workflow`",
    f"{_AGENT}.logprobs_mode": "logprobs are those of the distribution that tokens were drawn from",
    f"{_AGENT}.multi_turn": "turns and tools are your workflow's own",
    "actor_rollout_ref.model.path": "use `astuner.model.path`",
    "algorithm.filter_groups": "use `astuner.trainer_common.algorithm.dynamic_sampling`",
    "trainer.checkpoint_callback_class": "checkpoints are kept as `astuner.trainer_common` says",
    "trainer.save_freq": "use `astuner.trainer_common.save_freq` and `.resume_freq`",
    "trainer.max_actor_ckpt_to_keep": "use `astuner.trainer_common.keep_checkpoints`",
    "trainer.default_hdfs_dir": "checkpoints are resumed from and merged where the run's folder is",
    "actor_rollout_ref.actor.checkpoint": "checkpoints are whole, and read by astuner",
    "actor_rollout_ref.actor.strategy": "astuner reads and merges checkpoints of fsdp2",
    "actor_rollout_ref.ref.strategy": "astuner reads and merges checkpoints of fsdp2",
    "trainer.default_local_dir": "use `astuner.experiment_dir` and `astuner.experiment_name`",
    "trainer.device": "use `astuner.trainer_common.device`",
    "trainer.logger": "verl's metrics are read from its file and go on as verl/NAME to the "
    "sinks in `astuner.trainer_common.logger`",
    "trainer.resume_mode": "use --resume",
    "trainer.resume_from_path": "use --resume",
    "trainer.total_epochs": "use `astuner.trainer_common.total_epochs`",
    "trainer.total_training_steps": "use `astuner.trainer_common.total_steps`",
    "trainer.v1.sampler.custom_sampler": "astuner's own notes which groups a step was trained on",
    "trainer.v1.trainer_mode": "use `astuner.rollout.mode`",
    "ray_kwargs.ray_init.address": "use `astuner.trainer_common.ray_address`, or --ray-address",
    f"{_ENVIRONMENT}.{FOLDER_VARIABLE}": "verl's processes find the run by it",
    f"{_ENVIRONMENT}.{verl_cpu.VARIABLE}": "use `astuner.trainer_common.device`",
    f"{_ENVIRONMENT}.VERL_FILE_LOGGER_PATH": "astuner reads verl's metrics there",
    f"{_ENVIRONMENT}.VERL_USE_EXTERNAL_MODULES": "set it where you start astuner, which adds "
    "its own modules to it",
}
"""Setting, or section -> what to set instead, or why it is not for setting."""
FREE = ("data.trust_remote_code", "data.dataloader_num_workers")
"""The exceptions."""


def reserved(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with these flat raw settings."""
    for key, value in raw.items():
        needed, why = NEEDED.get(key, (value, ""))
        if value != needed:
            yield f"verl.{key}", f"is {value!r}, but has to be {needed!r}: {why}."
        elif (why := _not_for_setting(key)) is not None:
            yield f"verl.{key}", why


def _not_for_setting(key: str) -> str | None:
    if key in FREE:
        return None
    for section, instead in INSTEAD.items():
        if f"{key}.".startswith(f"{section}."):
            return f"is not for setting: {instead}."
        if section.startswith(f"{key}."):
            return "would replace a whole section of verl's: name the settings below it."
    return None
