"""What values a key may have, beyond its type: ranges, choices, and keys that belong together.

Plain tables first, then one small function for each rule over several keys.
`value_problems` never raises; `check_complete` and `check_backbone` do. Names of
algorithms are checked by their own registry, since this floor cannot see it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from astuner.config.environment import environment_problems
from astuner.config.keys import full, get, nearest_choice
from astuner.config.schema import BACKBONES, AstunerConfig
from astuner.config.targets import target_problems

Problem = tuple[tuple[str, ...], str]
"""The keys concerned, and what is wrong."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "backbone": BACKBONES,
    "model.device": ("auto", "cpu", "cuda", "mps"),
    "model.dtype": ("auto", "bfloat16", "float32"),
    "task_reader.type": (
        "jsonl_dataset_file",
        "huggingface_dat_repo",
        "reasoning_gym",
        "environment",
        "env_service",
        "traces",
        "random_dummy",
    ),
    "task_reader.traces.deduplicate": ("none", "exact", "near"),
    "task_judge.judge_type": (
        "none",
        "customized_protocol",
        "exact_match",
        "number_match",
        "math_verify",
        "reasoning_gym",
        "regex",
        "llm",
    ),
    "task_judge.llm.on_parse_failure": ("fail", "zero"),
    "context_tracker.merge": ("prefix", "none"),
    "rollout.mode": ("auto", "sync", "async"),
    "rollout.engine": ("auto", "vllm", "sglang", "embedded", "service"),
    "trainer_common.device": ("auto", "cuda", "cpu"),
    "debug.model": ("embedded", "endpoint", "fake"),
    "trainer_common.algorithm.loss_agg_mode": ("episode-mean", "token-mean", "constant"),
    "trainer_common.optim.lr_schedule": ("constant", "linear", "cosine"),
    "trainer_common.kl_loss_type": ("k1", "k2", "k3", "low_var_kl"),
}
LOGGERS = ("console", "tensorboard", "wandb", "swanlab", "trackio", "mlflow")

_AT_LEAST_ONE = [
    "model.lora.rank",
    "model.lora.alpha",
    "data.max_prompt_length",
    "data.max_response_length",
    "data.train_batch_size",
    "rollout.num_repeat",
    "rollout.max_response_length_in_one_turn",
    "rollout.max_num_seqs",
    "rollout.max_env_worker",
    "rollout.val_kwargs.num_repeat",
    "rollout.tensor_model_parallel_size",
    "rollout.nnodes",
    "rollout.n_gpus_per_node",
    "task_reader.reasoning_gym.size",
    "task_reader.random_dummy.size",
    "task_reader.environment.size",
    "env.max_instances",
    "debug.debug_first_n_tasks",
    "debug.debug_max_parallel",
    "debug.num_repeat",
    "trainer_common.total_epochs",
    "trainer_common.mini_batch_num",
    "trainer_common.micro_batch_tokens",
    "trainer_common.nnodes",
    "trainer_common.n_gpus_per_node",
]
_NOT_NEGATIVE = [
    "seed",
    "rollout.top_k",
    "rollout.max_model_len",
    "rollout.kv_cache_tokens",
    "rollout.max_staleness",
    "rollout.max_retries",
    "rollout.multi_turn.max_steps",
    "rollout.val_kwargs.temperature",
    "rollout.val_kwargs.top_k",
    "rollout.val_kwargs.max_tasks",
    "task_reader.reasoning_gym.validation_size",
    "task_reader.random_dummy.validation_size",
    "task_reader.environment.validation_size",
    "task_reader.max_train_tasks",
    "task_judge.llm.max_retries",
    "trainer_common.total_steps",
    "trainer_common.save_freq",
    "trainer_common.resume_freq",
    "trainer_common.keep_checkpoints",
    "trainer_common.test_freq",
    "trainer_common.algorithm.tis_cap",
    "trainer_common.algorithm.max_refill_rounds",
    "trainer_common.optim.warmup_steps",
    "trainer_common.optim.weight_decay",
    "trainer_common.optim.max_grad_norm",
    "trainer_common.kl_loss_coef",
]
_ABOVE_ZERO = [
    "rollout.episode_timeout",
    "rollout.call_timeout",
    "rollout.judge_timeout",
    "task_judge.llm.timeout",
    "trainer_common.optim.lr",
    "trainer_common.stall_timeout",
    "env.create_timeout",
    "env.step_timeout",
    "env.start_timeout",
    "env.lease",
    "service.timeout",
    "service.outage_timeout",
]

Test = Callable[[Any], bool]
_RANGES: Mapping[str, tuple[Test, str]] = {
    **dict.fromkeys(_AT_LEAST_ONE, (lambda v: v >= 1, "at least 1")),
    **dict.fromkeys(_NOT_NEGATIVE, (lambda v: v >= 0, "0 or more")),
    **dict.fromkeys(_ABOVE_ZERO, (lambda v: v > 0, "above 0")),
    "rollout.temperature": (lambda v: v >= 0, "0 or more"),
    "rollout.top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "rollout.gpu_memory_utilization": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "rollout.val_kwargs.top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "task_reader.traces.similarity": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "task_reader.validation_fraction": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "trainer_common.algorithm.clip_ratio_low": (
        lambda v: v == -1 or 0 <= v <= 1,
        "from 0 to 1, or -1 for the loss's own",
    ),
    "trainer_common.algorithm.clip_ratio_high": (
        lambda v: v == -1 or v >= 0,
        "0 or more, or -1 for the loss's own",
    ),
    "trainer_common.optim.betas": (
        lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v),
        "two numbers from 0 to below 1",
    ),
    "model_tuner.port": (lambda v: 0 <= v <= 65535, "from 0 to 65535"),
    "task_judge.wrong_reward": (lambda v: True, "a finite number"),
    "experiment_name": (
        lambda v: v not in ("", ".", "..") and not set(v) & set("/\\\0"),
        "the name of one folder, without slashes",
    ),
}


def value_problems(config: AstunerConfig) -> Iterator[Problem]:
    """Everything that is wrong with the values themselves."""
    for rule in (_ranges, _choices, _sampling, _regex, target_problems, environment_problems):
        yield from rule(config)


def missing_problems(
    config: AstunerConfig, *, workflow: bool, tasks: bool, judge: bool
) -> Iterator[Problem]:
    """What a run needs and the configuration does not say. The flags tell what was given
    as a Python object instead."""
    if not workflow and not config.rollout.user_workflow:
        yield (
            ("rollout.user_workflow",),
            (
                "no workflow is set. Give the class that runs your agent, "
                "e.g. my_package.my_module->MyWorkflow or path/to/file.py->MyWorkflow."
            ),
        )
    needed: list[tuple[str, str]] = []
    if not tasks:
        needed += _needed_by("task_reader.type", config.task_reader.type)
    if not judge:
        needed += _needed_by("task_judge.judge_type", config.task_judge.judge_type)
    if config.backbone == "debug":
        needed += _needed_by("debug.model", config.debug.model)
    needed += _needed_by("backbone", config.backbone)
    for name, why in needed:
        if not get(config, name):
            yield (name,), f"`{full(name)}` must be set, because {why}."


_NEEDS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("backbone", "tinker"): ("service.base_url", "service.api_key_env"),
    ("task_reader.type", "jsonl_dataset_file"): (
        "task_reader.jsonl_dataset_file.training.file_path",
    ),
    ("task_reader.type", "huggingface_dat_repo"): (
        "task_reader.huggingface_dat_repo.dataset_path",
        "task_reader.huggingface_dat_repo.training_split",
    ),
    ("task_reader.type", "reasoning_gym"): ("task_reader.reasoning_gym.dataset",),
    ("task_judge.judge_type", "customized_protocol"): ("task_judge.judge_protocol",),
    ("task_judge.judge_type", "regex"): ("task_judge.regex.pattern",),
    ("task_judge.judge_type", "llm"): ("task_judge.llm.base_url", "task_judge.llm.model"),
    ("debug.model", "endpoint"): ("debug.endpoint.base_url", "debug.endpoint.model"),
    ("debug.model", "fake"): ("debug.fake_replies",),
}


def _needed_by(name: str, choice: str) -> list[tuple[str, str]]:
    return [(need, f"`{full(name)}` is {choice}") for need in _NEEDS.get((name, choice), ())]


def _ranges(config: AstunerConfig) -> Iterator[Problem]:
    for name, (test, wanted) in _RANGES.items():
        value = get(config, name)
        endless = isinstance(value, float) and not math.isfinite(value)
        if endless or not test(value):
            yield (name,), f"`{full(name)}` must be {wanted}, but is {value!r}."


def _choices(config: AstunerConfig) -> Iterator[Problem]:
    for name, choices in CHOICES.items():
        value = get(config, name)
        if name == "model.device" and re.fullmatch(r"cuda:\d+", value):
            continue
        if value not in choices:
            yield (name,), _not_a_choice(name, value, choices)
    for value in config.trainer_common.logger:
        if value not in LOGGERS:
            yield ("trainer_common.logger",), _not_a_choice("trainer_common.logger", value, LOGGERS)


def _not_a_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    near = nearest_choice(value, choices)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"`{full(name)}` is {value!r}, but must be one of {', '.join(choices)}.{hint}"


def _sampling(config: AstunerConfig) -> Iterator[Problem]:
    """Design rule 3: the recorded logprobs must be those of the policy that is trained."""
    rollout = config.rollout
    if config.backbone == "debug" and not config.debug.train_step:
        return
    if rollout.temperature == 0:
        yield (
            ("rollout.temperature",),
            (
                f"`{full('rollout.temperature')}` must be above 0 for training, but is 0: greedy "
                "episodes of one task are all alike and teach nothing. Validation has its own, "
                f"`{full('rollout.val_kwargs.temperature')}`."
            ),
        )
    truncated = [
        name
        for name, whole in (("rollout.top_p", 1.0), ("rollout.top_k", 0))
        if get(config, name) != whole
    ]
    if truncated and not rollout.allow_biased_sampling:
        shown = " and ".join(f"`{full(name)}` = {get(config, name)!r}" for name in truncated)
        yield (
            tuple(truncated),
            (
                f"{shown} cut the distribution that samples, while the whole one is trained, so "
                "every importance ratio is biased. Remove it, or accept the bias with "
                f"`{full('rollout.allow_biased_sampling')}: true`."
            ),
        )


def _regex(config: AstunerConfig) -> Iterator[Problem]:
    pattern = config.task_judge.regex.pattern
    try:
        re.compile(pattern.replace("{answer}", "x"))
    except re.error as error:
        yield (
            ("task_judge.regex.pattern",),
            (
                f"`{full('task_judge.regex.pattern')}` is not a regular expression: {error} "
                f"in {pattern!r}."
            ),
        )
