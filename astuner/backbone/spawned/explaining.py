"""For `astuner explain`: what each of our keys becomes in a trainer's own configuration.

A backbone writes a `Table`; what it sets at the moment comes as flat settings. Raw ones,
which win, stand under the backbone's name (`astuner.verl`). Pure, but for `looked_up`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from astuner.backbone import overriding
from astuner.backbone.overriding import pair
from astuner.backbone.spawned.choices import Problem, wanted_device
from astuner.backbone.translation import Translation
from astuner.config.keys import full, keys
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError

ITSELF = "read by astuner itself"
Settings = Mapping[str, Any]


def machine(config: AstunerConfig) -> str:
    """For which machine a translation is said; "" where the configuration tells."""
    if wanted_device(config) != "auto":
        return ""
    return (
        "as on a machine with GPUs; where none is visible a run takes the CPU, which "
        "trainer_common.device=cpu shows"
    )


@dataclass(frozen=True)
class Table:
    """For every key of the schema what becomes of it."""

    name: str
    """The backbone's."""
    becomes: Mapping[str, tuple[str, ...]]
    """Key -> those of the trainer's that it sets, alone or with others; some in one mode only."""
    read_here: Sequence[str]
    """Keys, or sections ("env."), that astuner reads as they are."""
    unset: Mapping[str, str]
    """Key -> what is said of it where it sets nothing."""
    remarks: Mapping[str, str]
    """Key -> in what the trainer differs a little, whatever it is set to."""

    def in_words(self, settings: Settings, raw: Settings) -> dict[str, str]:
        """Of each key: "verl: KEY=VALUE, ...", "read by astuner itself", or what it says where
        it sets nothing."""
        return {name: self._of(name, settings, raw) for name in keys()}

    def explained(
        self, settings: Settings, raw: Settings, problems: Sequence[Problem], notes: Sequence[str]
    ) -> Translation:
        """`settings` are those that astuner would set by itself."""
        named = {key for of_key in self.becomes.values() for key in of_key}
        refused = [f"`{full(key)}` {message}" for key, message in problems]
        always = {key: value for key, value in settings.items() if key not in named}
        return Translation(self.in_words(settings, raw), always, tuple(notes), tuple(refused))

    def _of(self, name: str, settings: Settings, raw: Settings) -> str:
        if name == self.name:
            return self._pairs(raw, settings, raw) or "nothing"
        remark = f" ({self.remarks[name]})" if name in self.remarks else ""
        if any(name == key or (key[-1] == "." and name.startswith(key)) for key in self.read_here):
            return f"{ITSELF}{remark}"
        set_now = {key: settings[key] for key in self.becomes.get(name, ()) if key in settings}
        pairs = self._pairs(set_now, settings, raw)
        return f"{pairs}{remark}" if pairs else self.unset.get(name, "")

    def _pairs(self, told: Settings, settings: Settings, raw: Settings) -> str:
        replaced = overriding.overridden(settings, raw)
        pairs = [pair(key, value, replaced, self.name) for key, value in told.items()]
        return f"{self.name}: {', '.join(pairs)}" if pairs else ""


def looked_up(
    raw: Settings, name: str, trainer: str, compose: Callable[[Settings], object]
) -> tuple[list[str], list[str]]:
    """Of raw settings: a note that the trainer cannot be asked here, or what it finds wrong when
    its configuration is composed. Slow where it can: its package `name` is imported."""
    if not raw:
        return [], []
    if find_spec(name) is None:
        there = "shows where it is installed."
        return [f"Whether {trainer} knows what is under `astuner.{name}` {there}"], []
    try:
        compose(raw)
    except ConfigError as error:
        return [], [str(error)]
    return [], []
