"""`astuner explain` without the table: one row for every key.

What a key becomes in a backbone's own configuration is told by the backbone, as
a mapping; this module knows no backbone. It draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from astuner.config.keys import full, get, keys
from astuner.config.loaded import LoadedConfig
from astuner.config.readers import why_unread

NOT_USED = "not used"


@dataclass(frozen=True, slots=True)
class ExplainRow:
    """One key as the run will see it."""

    key: str
    """With the root: "astuner.rollout.num_repeat"."""
    value: Any
    origin: str
    """ "default", "x.yaml:12", "command line" or "python"."""
    becomes: str
    """The backbone's own name for it, "read as is", or "not used (why)"."""
    used: bool
    doc: str = ""


def explain(
    loaded: LoadedConfig, backbone: str, translate: Mapping[str, str] | None = None
) -> list[ExplainRow]:
    """A row for every key of the schema, in its order.

    `translate` maps a key (without the root) to what it becomes in the backbone's own
    configuration; an empty text, or one that begins with "not used", says that the backbone
    does not use it. Keys it does not name are read as they are.
    """
    translate = translate or {}
    return [
        _row(loaded, name, translate.get(name, "read as is"), backbone, key.doc)
        for name, key in keys().items()
    ]


def _row(loaded: LoadedConfig, name: str, becomes: str, backbone: str, doc: str) -> ExplainRow:
    why = why_unread(loaded.config, name, backbone)
    if why is None and not becomes:
        why = f"the backbone {backbone} has nothing like it"
    unused = why is not None or becomes.startswith(NOT_USED)
    return ExplainRow(
        key=full(name),
        value=get(loaded.config, name),
        origin=str(loaded.origins[name]),
        becomes=becomes if why is None else f"{NOT_USED} ({why})",
        used=not unused,
        doc=doc,
    )
