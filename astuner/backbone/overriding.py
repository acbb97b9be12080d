"""Settings of a trainer's own that a user gives as they are: they win, and it is said.

`section` is the key they stand under ("verl": `astuner.verl`). All settings are flat:
dotted keys and plain values. What each key means, and which are not for setting, is the
backbone's to know.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

Replaced = Mapping[str, tuple[Any, Any]]
"""Key -> what astuner would set, and what it is instead."""


def flat(tree: Mapping[str, Any], *, lists: bool = False) -> dict[str, Any]:
    """Dotted keys down to the last mapping; with `lists` an entry of a list of mappings has its
    number as a key."""
    return dict(_leaves("", tree, lists))


def _leaves(prefix: str, tree: Mapping[str, Any], lists: bool) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if branches := _branches(value, lists):
            yield from _leaves(f"{prefix}{key}.", branches, lists)
        else:
            yield f"{prefix}{key}", value


def _branches(value: Any, lists: bool) -> dict[str, Any]:
    """What lies below; nothing below a plain value, or a list of such."""
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    if lists and isinstance(value, list):
        entries = cast("list[Any]", value)
        if entries and all(isinstance(entry, dict) for entry in entries):
            return {str(number): entry for number, entry in enumerate(entries)}
    return {}


def overridden(ours: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The translated settings that a raw one changes."""
    return {
        key: (ours[key], value) for key, value in raw.items() if key in ours and ours[key] != value
    }


def pair(key: str, value: Any, replaced: Replaced, section: str) -> str:
    """One setting for `astuner explain`."""
    if key not in replaced:
        return f"{key}={json.dumps(value)}"
    ours, theirs = replaced[key]
    return f"{key}={json.dumps(theirs)} (astuner.{section}, instead of {json.dumps(ours)})"


def announced(replaced: Replaced, section: str) -> list[str]:
    """What a run says before it starts."""
    return [
        f"`astuner.{section}` sets {key}={json.dumps(theirs)} instead of {json.dumps(ours)}."
        for key, (ours, theirs) in replaced.items()
    ]


NEAR = 0.7
"""Of two names, at least this alike (difflib's ratio), one may be meant for the other."""


def nearest(known: Iterable[str], key: str) -> str | None:
    """The setting that a mistyped `key` most likely means; its last part decides first."""
    section, _, leaf = key.rpartition(".")
    scored: list[tuple[float, str]] = []
    for name in known:
        known_section, _, known_leaf = name.rpartition(".")
        likeness = difflib.SequenceMatcher(None, leaf, known_leaf).ratio()
        if likeness >= NEAR:
            same = difflib.SequenceMatcher(None, section, known_section).ratio()
            scored.append((likeness + same, name))
    return max(scored)[1] if scored else None
