"""From what a model wrote to an action.

Looks for the action where models put it: in <action>...</action>, after "Action:", in
\\boxed{...}, or else the last word of the text that names one. Pure functions; what the
actions are called is the environment's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_NUMBER = r"\d{1,9}"
"""What runs on for longer is no action's number."""
_MARKED = (
    re.compile(r"<action>(.*?)</action>", re.DOTALL | re.IGNORECASE),
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"^\W*action\W*[:=]\s*(.+?)[\s.*]*$", re.MULTILINE | re.IGNORECASE),
)


def marked_action(text: str) -> str | None:
    """What the last mark in the text encloses, if there is any."""
    for pattern in _MARKED:
        found = pattern.findall(text)
        if found:
            return str(found[-1]).strip()
    return None


def extract_action(text: str, names: Mapping[str, int] | Sequence[str]) -> int | None:
    """The number of the action that the text names, by name or number; None if it names none.

    A marked action counts alone. Without a mark the last name or number counts, so that a
    model may think before it acts; names are matched as whole words, longer ones first.
    """
    table = names if isinstance(names, Mapping) else {name: i for i, name in enumerate(names)}
    table = {name.lower(): number for name, number in table.items()}
    numbers = set(table.values())
    marked = marked_action(text)
    searched = (text if marked is None else marked).lower()
    words = sorted(table, key=len, reverse=True)
    pattern = "|".join([*(re.escape(word) for word in words), _NUMBER])
    for found in reversed(re.findall(rf"(?<![\w.-])(?:{pattern})(?![\w]|\.\d)", searched)):
        if found in table:
            return table[found]
        if int(found) in numbers:
            return int(found)
    return None
