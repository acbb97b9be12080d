"""What no spawned trainer can do as astuner means it, whichever it is: a key, and why.

Rules that take what differs from trainer to trainer as an argument. The trainer's own are
in its backbone's `limits`, which also says which rules there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from astuner.algorithm import ADVANTAGES
from astuner.backbone.spawned.choices import Problem
from astuner.config.keys import full
from astuner.config.loaded import joined
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError

WHOLE_BATCH = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")
"""Estimators that compare a group with the other groups of the batch."""
_ESTIMATOR = "trainer_common.algorithm.adv_estimator"


def refuse(problems: Sequence[Problem]) -> None:
    """Raises ConfigError with all of them, if there are any."""
    if problems:
        raise ConfigError(joined([f"`{full(key)}` {message}" for key, message in problems]))


def estimator(config: AstunerConfig, or_its_own: str = "") -> Iterator[Problem]:
    """One that there is, and that needs no more than its group: advantages are computed where
    the episodes are played. `or_its_own` tells how to take the trainer's."""
    name = config.trainer_common.algorithm.adv_estimator
    if name in WHOLE_BATCH:
        yield (
            _ESTIMATOR,
            f"is {name!r}, which needs the whole batch, but advantages are computed group by "
            f"group, in the processes that play them. Use grpo, dr_grpo, rloo or reinforce"
            f"{or_its_own}.",
        )
    elif name not in ADVANTAGES and "->" not in name:
        yield (
            _ESTIMATOR,
            f"is {name!r}, but must be one of {', '.join(ADVANTAGES)}, or "
            '"package.module->function".',
        )


def estimator_of_groups(config: AstunerConfig) -> Iterator[str]:
    """A note on a user's own."""
    name = config.trainer_common.algorithm.adv_estimator
    if "->" in name:
        yield f"The advantage estimator {name} is given one group at a time."


def one_port(config: AstunerConfig, processes: int) -> Iterator[Problem]:
    """A given port is for one proxy."""
    if config.model_tuner.port and processes > 1:
        yield (
            "model_tuner.port",
            f"is {config.model_tuner.port}, but episodes run in {processes} processes with a "
            "proxy each: 0 gives each a free one.",
        )


def no_staleness(config: AstunerConfig, or_else: str = "") -> Iterator[Problem]:
    if config.rollout.mode == "async" and config.rollout.max_staleness == 0:
        yield (
            "rollout.max_staleness",
            "is 0, which is synchronous, but `astuner.rollout.mode` is async. Set it to 1 or "
            f"more{or_else}.",
        )


def cache_size(config: AstunerConfig, engine: str) -> Iterator[Problem]:
    """Of an engine that takes a share of its GPU's memory."""
    if config.rollout.kv_cache_tokens:
        yield (
            "rollout.kv_cache_tokens",
            f"is {config.rollout.kv_cache_tokens}, but {engine} sizes its cache by "
            f"`{full('rollout.gpu_memory_utilization')}`.",
        )
