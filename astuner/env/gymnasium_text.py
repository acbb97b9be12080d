"""A Gymnasium environment for a reader and writer of text.

Observations are its "ansi" rendering where it has one, else its observation in words;
actions come as names or numbers (discrete spaces) or JSON (the others). What is no action
changes nothing: the observation says what would be one, with reward 0 and
`info["invalid_action"]`. One environment at a time, no vectors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from astuner.env.actions import extract_action, marked_action
from astuner.env.protocol import Action, EnvMaker, Info, Observation, action_text
from astuner.errors import EnvError, MissingDependency

ACTION_NAMES: Mapping[str, Sequence[str]] = {
    "FrozenLake": ("left", "down", "right", "up"),
    "CliffWalking": ("up", "right", "down", "left"),
    "Taxi": ("south", "north", "east", "west", "pickup", "dropoff"),
    "Blackjack": ("stick", "hit"),
    "CartPole": ("left", "right"),
    "MountainCar": ("left", "wait", "right"),
    "Acrobot": ("left", "wait", "right"),
    "LunarLander": ("wait", "left", "main", "right"),
}
"""The names of discrete actions, in order, by the environment's name without its version."""
_HIGHLIGHT = re.compile(r"\x1b\[4\dm(.*?)\x1b\[0m")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class GymnasiumText:
    """A `gymnasium.Env` as a TextEnv."""

    def __init__(
        self,
        env: Any,
        *,
        actions: Sequence[str] | None = None,
        describe: Callable[[Any, Any], str] | None = None,
    ) -> None:
        """`actions` are names in place of `ACTION_NAMES`; `describe(env, observation)` writes
        the observation."""
        self.env = env
        name = env.spec.id.partition("-v")[0] if env.spec is not None else ""
        self._names = tuple(actions or ACTION_NAMES.get(name, ()))
        self._describe = describe or _described

    @property
    def action_help(self) -> str:
        """What an action is, in words."""
        space = self.env.action_space
        if self._names:
            return f"The actions are: {', '.join(self._names)}."
        if hasattr(space, "n"):
            first = int(getattr(space, "start", 0))
            return f"The actions are the numbers {first} to {first + int(space.n) - 1}."
        return f"An action is JSON for {space}."

    def reset(self, *, seed: int | None = None) -> tuple[Observation, Info]:
        observation, info = self.env.reset(seed=seed)
        return self._describe(self.env, observation), _plain(info)

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, Info]:
        chosen = self._parse(action)
        if chosen is None:
            shown = action_text(action).strip()[:80]
            message = f"{shown!r} is not an action. {self.action_help}"
            return message, 0.0, False, False, {"invalid_action": True}
        observation, reward, terminated, truncated, info = self.env.step(chosen)
        text = self._describe(self.env, observation)
        return text, float(reward), bool(terminated), bool(truncated), _plain(info)

    def get_info(self) -> str:
        return self.action_help

    def close(self) -> None:
        self.env.close()

    def _parse(self, action: Action) -> Any:
        """The action as the space takes it; None if there is none in it."""
        space = self.env.action_space
        if not isinstance(action, str | Mapping | list) and space.contains(action):
            return action
        text = action_text(cast(Action, action))
        if hasattr(space, "n"):
            first = int(getattr(space, "start", 0))
            names = self._names or [str(first + i) for i in range(int(space.n))]
            return extract_action(text, {name: first + i for i, name in enumerate(names)})
        return _from_json(space, marked_action(text) or text)


def gymnasium_ids() -> list[str]:
    """Every id that `gymnasium.make` knows here. Raises MissingDependency."""
    return sorted(_gymnasium().registry)


def gymnasium_maker(env_id: str, cls: type | None = None) -> EnvMaker:
    """A maker for an id of `gymnasium.make`, or for a class of `gymnasium.Env`; an instance's
    `params` are its keyword arguments."""
    gymnasium = _gymnasium()

    def make(task_id: str, params: dict[str, Any]) -> GymnasiumText:
        given = {key: value for key, value in params.items() if key != "seed"}
        if cls is not None:
            modes: Sequence[str] = getattr(cls, "metadata", {}).get("render_modes", ())
            ansi = {"render_mode": "ansi"} if "ansi" in modes else {}
            return GymnasiumText(cls(**{**ansi, **given}))
        try:
            return GymnasiumText(gymnasium.make(env_id, **{**_ansi(env_id), **given}))
        except (gymnasium.error.Error, TypeError) as error:
            raise EnvError(
                f"gymnasium.make({env_id!r}) refused: {error}. Its arguments come from env.params "
                f"and were {given}.",
                cause="refused",
            ) from None

    return make


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError:
        raise MissingDependency("gymnasium", "env", "An environment of gymnasium.make") from None
    return gymnasium


def _ansi(env_id: str) -> dict[str, str]:
    gymnasium = _gymnasium()
    module, _, name = env_id.rpartition(":")
    if module:
        __import__(module)
    entry = gymnasium.spec(name).entry_point
    cls: Any = (
        gymnasium.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    )
    modes = getattr(cls, "metadata", {}).get("render_modes", ())
    return {"render_mode": "ansi"} if "ansi" in modes else {}


def _described(env: Any, observation: Any) -> str:
    """The rendering if it is text, with the highlighted cell in brackets; else the values."""
    if env.render_mode == "ansi":
        rendered = _HIGHLIGHT.sub(r"[\1]", str(env.render()))
        return _ESCAPES.sub("", rendered).strip("\n")
    return observation if isinstance(observation, str) else json.dumps(_plain(observation))


def _plain(value: Any) -> Any:
    """numpy values as what JSON has; floats with four digits."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast(Sequence[Any], value)]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return round(value, 4)
    return value if isinstance(value, str | int | bool | None) else str(value)


def _from_json(space: Any, text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text if hasattr(space, "character_set") and space.contains(text) else None
    try:
        value = _as_space(space, value)
    except (TypeError, ValueError, OverflowError):  # a ragged list, words for numbers
        return None
    return value if space.contains(value) else None


def _as_space(space: Any, value: Any) -> Any:
    """JSON's lists and numbers as the arrays and tuples that the space is of."""
    import numpy as np

    parts = getattr(space, "spaces", None)
    if isinstance(parts, Mapping) and isinstance(value, Mapping):
        inner = cast(Mapping[str, Any], parts)
        given = cast(Mapping[str, Any], value)
        return {k: _as_space(inner[k], v) if k in inner else v for k, v in given.items()}
    if isinstance(parts, tuple) and isinstance(value, list) and len(parts) == len(value):
        pairs = zip(cast(tuple[Any, ...], parts), cast(list[Any], value), strict=True)
        return tuple(_as_space(part, item) for part, item in pairs)
    if getattr(space, "dtype", None) is not None and isinstance(value, list | int | float):
        return np.asarray(value, dtype=space.dtype)
    return value
