"""Which backbone reads which key, and which sections a chosen type leaves unread.

`check_backbone` keeps a configuration from lying: a key that was set and that
the backbone does not read is an error or a warning. `check_complete` refuses a
run that lacks something. Neither looks at values that are merely wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

from astuner.config.check import missing_problems
from astuner.config.keys import full, get, keys
from astuner.config.loaded import COMMAND_LINE, LoadedConfig, Origin, joined
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError

_SELECTED: Mapping[str, tuple[str, object]] = {
    "task_reader.jsonl_dataset_file": ("task_reader.type", "jsonl_dataset_file"),
    "task_reader.huggingface_dat_repo": ("task_reader.type", "huggingface_dat_repo"),
    "task_reader.reasoning_gym": ("task_reader.type", "reasoning_gym"),
    "task_reader.environment": ("task_reader.type", "environment"),
    "task_reader.env_service": ("task_reader.type", "env_service"),
    "task_reader.traces": ("task_reader.type", "traces"),
    "task_reader.random_dummy": ("task_reader.type", "random_dummy"),
    "task_judge.judge_protocol": ("task_judge.judge_type", "customized_protocol"),
    "task_judge.regex": ("task_judge.judge_type", "regex"),
    "task_judge.llm": ("task_judge.judge_type", "llm"),
    "task_reader.traces.similarity": ("task_reader.traces.deduplicate", "near"),
    "debug.endpoint": ("debug.model", "endpoint"),
    "debug.fake_replies": ("debug.model", "fake"),
    "model.lora.rank": ("model.lora.enable", True),
    "model.lora.alpha": ("model.lora.enable", True),
    "model.lora.target_modules": ("model.lora.enable", True),
    "rollout.nnodes": ("rollout.mode", "async"),
    "rollout.n_gpus_per_node": ("rollout.mode", "async"),
    "trainer_common.kl_loss_coef": ("trainer_common.use_kl_loss", True),
    "trainer_common.kl_loss_type": ("trainer_common.use_kl_loss", True),
    "trainer_common.algorithm.max_refill_rounds": (
        "trainer_common.algorithm.dynamic_sampling",
        True,
    ),
}
"""A key or section -> the key that selects it, and the value that does."""

_NOT_IN_DEBUG: Mapping[str, str] = {
    "data.train_batch_size": "debug runs debug.debug_first_n_tasks tasks",
    "rollout.num_repeat": "debug reads debug.num_repeat",
    "rollout.max_env_worker": "debug reads debug.debug_max_parallel",
    "rollout.max_retries": "debug tries every episode once",
    "rollout.max_staleness": "debug publishes no weights",
    "rollout.val_kwargs": "debug runs no validation",
    "task_reader.shuffle": "debug takes the tasks in their order",
}
"""What the backbone debug does instead of reading a key or section."""

_NOT_IN_TINKER: Mapping[str, str] = dict.fromkeys(
    (
        "model.device",
        "model.dtype",
        "model.lora.alpha",
        "rollout.max_num_seqs",
        "rollout.kv_cache_tokens",
        "trainer_common.micro_batch_tokens",
        "trainer_common.gradient_checkpointing",
    ),
    "it is the service's own choice",
)
"""What the backbone tinker leaves to the service."""


def why_unread(config: AstunerConfig, name: str, backbone: str) -> str | None:
    """Why the run does not read this key, or None if it does."""
    readers = keys()[name].backbones
    if readers and backbone not in readers:
        return f"only {' and '.join(readers)} read it"
    training = name.startswith("trainer_common.")
    if backbone == "debug" and training and not config.debug.train_step:
        return "debug does not train unless debug.train_step is true"
    if backbone == "debug":
        for part, why in _NOT_IN_DEBUG.items():
            if name == part or name.startswith(f"{part}."):
                return why
    if backbone == "tinker" and name in _NOT_IN_TINKER:
        return _NOT_IN_TINKER[name]
    return _why_unselected(config, name)


def _why_unselected(config: AstunerConfig, name: str) -> str | None:
    for part, (selector, choice) in _SELECTED.items():
        chosen = get(config, selector)
        if chosen != choice and (name == part or name.startswith(f"{part}.")):
            return f"{full(selector)} is {chosen}"
    return None


def check_backbone(loaded: LoadedConfig, backbone: str) -> list[str]:
    """Warnings about keys that were set but are not read. Raises ConfigError where that
    must be a mistake.

    One file serves training and debugging alike: a `debug` section in it is fine for every
    backbone, and the backbone debug itself refuses nothing.
    """
    errors: list[str] = []
    warnings: list[str] = []
    for name, origin in loaded.set_by_user().items():
        readers = keys()[name].backbones
        if readers and backbone not in readers:
            if backbone == "debug":
                warnings.append(_unread(loaded, name, origin, backbone))
            elif readers != ("debug",) or origin == COMMAND_LINE:
                errors.append(_unread(loaded, name, origin, backbone))
        elif why := _why_worth_telling(loaded, name, origin, backbone):
            warnings.append(f"{origin}: `{full(name)}` is set but not read: {why}.")
    if errors:
        raise ConfigError(joined(errors))
    return warnings


def _why_worth_telling(
    loaded: LoadedConfig, name: str, origin: Origin, backbone: str
) -> str | None:
    """What was typed for this very run should be read by it; a file serves several."""
    if origin == COMMAND_LINE or (backbone == "tinker" and name in _NOT_IN_TINKER):
        return why_unread(loaded.config, name, backbone)
    return _why_unselected(loaded.config, name)


def check_complete(
    loaded: LoadedConfig, *, workflow: bool = False, tasks: bool = False, judge: bool = False
) -> None:
    """Refuse a configuration that cannot run: no workflow, no data, half a judge.

    The flags say what was given as a Python object. Raises ConfigError.
    """
    problems = [
        f"{loaded.path or 'the configuration'}: {message}"
        for _, message in missing_problems(
            loaded.config, workflow=workflow, tasks=tasks, judge=judge
        )
    ]
    if problems:
        raise ConfigError(joined(problems))


def _unread(loaded: LoadedConfig, name: str, origin: Origin, backbone: str) -> str:
    readers = " and ".join(keys()[name].backbones)
    return (
        f"{origin}: `{full(name)}` = {get(loaded.config, name)!r} has no effect with the backbone "
        f"{backbone}; only {readers} read it. Remove it, or choose --backbone "
        f"{keys()[name].backbones[0]}."
    )
