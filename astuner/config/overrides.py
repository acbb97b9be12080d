"""Overrides from the command line: `rollout.num_repeat=4`.

The value is YAML, read with the type of the key in mind: for a text key it is
taken as it stands (`task_judge.regex.pattern=[0-9]+` is no list), unless it is
quoted. The root may be named or not. Hydra's `+` and `++` in front are accepted
and mean nothing here, because every key exists; its `~` is refused.
"""

from __future__ import annotations

from typing import Any

import yaml

from astuner.config.keys import RUN, Table
from astuner.config.source import parse_value
from astuner.errors import ConfigError


def parse_override(text: str, table: Table = RUN) -> tuple[str, Any]:
    """`key=value` as (key below the root, value). Raises ConfigError if malformed; whether
    the key exists is checked where it is applied."""
    name, equals, raw = text.partition("=")
    name = name.strip()
    if name.startswith("~"):
        raise ConfigError(
            f"The override {text!r} wants to delete a key. Every key has a value; "
            f"set it instead: {table.short(name[1:])}=VALUE."
        )
    name = table.short(name.removeprefix("++").removeprefix("+"))
    if not equals or not name or any(not part for part in name.split(".")):
        raise ConfigError(
            f"The override {text!r} is malformed. Write key=value, e.g. rollout.num_repeat=4."
        )
    return name, _value(name, raw.strip(), text, table)


def _value(name: str, raw: str, text: str, table: Table) -> Any:
    key = table.keys.get(name)
    quoted = raw[:1] in ("'", '"')
    if raw == "" or (key is not None and key.type is str and not quoted and raw != "null"):
        return raw
    try:
        return parse_value(raw)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(
            f"The value in the override {text!r} is not valid YAML: {problem}. "
            "Put it in quotes if it is a text."
        ) from None
