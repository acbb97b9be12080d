"""What a judge (or a workflow) returned, as one checked Verdict.

A reward is a finite number, a list of them (one for each LLM call), a dict of either
by target tag, or any of these with `is_success` as a pair. Anything else is a
RewardError that says what was seen. Whether a list has as many entries as there were
calls, and whether such targets exist, is for whoever knows the calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

from astuner.errors import RewardError

_EXPECTED = (
    "Return a number, (number, is_success), or a list of numbers with one for each LLM call; "
    "with several agents a dict {target_tag: number or list}."
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The reward of one episode."""

    reward: float
    """Finite; of a list, the sum; of a dict, the mean over its targets."""
    turn_rewards: tuple[float, ...] | None
    """The list itself, if one was given."""
    is_success: bool | None
    target_rewards: Mapping[str, tuple[float, ...]] | None = None
    """Of a dict: target tag -> (its number,) or its list."""
    listed: frozenset[str] = frozenset()
    """The targets that got a list: one entry is then for one call, not for all."""


def to_verdict(outcome: Any, is_success: bool | None = None) -> Verdict:
    """Read `outcome`: a number (Python, numpy, a tensor of one element; a bool is 1 or 0
    and also says `is_success`), a list or array of numbers, a dict of either by target tag,
    or a pair of any of these with a bool. Raises RewardError."""
    if isinstance(outcome, tuple):
        outcome, is_success = _pair(cast("tuple[Any, ...]", outcome))
    value = _plain(outcome)
    if isinstance(value, Mapping):
        return _by_target(cast("Mapping[Any, Any]", value), is_success)
    if isinstance(value, list):
        rewards = tuple(_number(_plain(v), f" at turn {i}") for i, v in enumerate(value))
        if not rewards:
            raise RewardError(f"The reward is an empty list. {_EXPECTED}")
        return Verdict(_number(sum(rewards), " (the sum of the list)"), rewards, is_success)
    if isinstance(value, bool) and is_success is None:
        is_success = value
    return Verdict(_number(value), None, is_success)


def _by_target(rewards: Mapping[Any, Any], is_success: bool | None) -> Verdict:
    if not rewards:
        raise RewardError(f"The reward is an empty dict. {_EXPECTED}")
    targets: dict[str, tuple[float, ...]] = {}
    listed: set[str] = set()
    for tag, given in rewards.items():
        if not isinstance(tag, str):
            raise RewardError(f"The reward names the target {tag!r}, not a text. {_EXPECTED}")
        value = _plain(given)
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        if isinstance(value, list):
            listed.add(tag)
        if not values:
            raise RewardError(f"The reward of target {tag!r} is an empty list. {_EXPECTED}")
        targets[tag] = tuple(_number(_plain(v), f" of target {tag!r}") for v in values)
    sums = [sum(of_target) for of_target in targets.values()]
    mean = _number(sum(sums) / len(sums), " (the mean over the targets)")
    return Verdict(mean, None, is_success, targets, frozenset(listed))


def _pair(outcome: tuple[Any, ...]) -> tuple[Any, bool | None]:
    success = _plain(outcome[1]) if len(outcome) == 2 else ...
    if success is None or isinstance(success, bool):
        return outcome[0], success
    raise RewardError(
        f"The reward is the tuple {outcome!r}, but a tuple means (reward, is_success) with "
        f"is_success True, False or None. {_EXPECTED}"
    )


def _plain(value: Any) -> Any:
    """numpy scalars and arrays, and tensors, as Python numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _number(value: Any, where: str = "") -> float:
    if value is None:
        raise RewardError(f"The reward{where} is None. Is a `return` missing? {_EXPECTED}")
    if not isinstance(value, Real):
        raise RewardError(
            f"The reward{where} is {value!r} ({type(value).__name__}), not a number. {_EXPECTED}"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(
            f"The reward{where} is {number}, which cannot be trained on. "
            "Guard divisions and logarithms in the reward."
        )
    return number
