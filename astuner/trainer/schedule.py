"""The learning rate of each step: a pure function, so a resumed run goes on with the same.

Steps count from 1. Warm-up rises in equal parts and reaches the full rate at its
last step; the first step after it has the full rate too. A decaying schedule would
reach zero one step after the last, so that no step is wasted at rate zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from astuner.errors import ConfigError

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2,
}
"""Name -> the factor on the rate after the fraction `done` of the decaying steps."""


def check_schedule(name: str) -> None:
    """Raises ConfigError for an unknown name."""
    if name not in SCHEDULES:
        raise ConfigError(
            f"trainer_common.optim.lr_schedule is {name!r}; choose one of: {', '.join(SCHEDULES)}."
        )


def learning_rate(
    step: int, *, lr: float, schedule: str, warmup_steps: int, total_steps: int
) -> float:
    """The rate of this step, 1 <= step <= total_steps."""
    if step <= warmup_steps:
        return lr * step / warmup_steps
    decaying = max(1, total_steps - warmup_steps)
    return lr * SCHEDULES[schedule]((step - warmup_steps - 1) / decaying)
