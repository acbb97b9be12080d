"""What loading gives: the configuration, and where each of its values came from.

Only the words; the work is in `load.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from astuner.config.schema import AstunerConfig


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from."""

    kind: Literal["default", "file", "command line", "python"]
    where: str = ""
    """ "x.yaml:12" for a file."""

    def __str__(self) -> str:
        return self.where or self.kind


DEFAULT = Origin("default")
COMMAND_LINE = Origin("command line")
PYTHON = Origin("python")


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration whose every value is valid, and where each came from."""

    config: AstunerConfig
    origins: Mapping[str, Origin]
    """For every key below the root, e.g. "rollout.num_repeat"."""
    path: Path | None = None

    def set_by_user(self) -> dict[str, Origin]:
        """The keys that do not come from the schema's defaults."""
        return {name: origin for name, origin in self.origins.items() if origin != DEFAULT}


def joined(problems: Sequence[str]) -> str:
    """One message out of one or more problems."""
    if len(problems) == 1:
        return problems[0]
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return f"The configuration has {len(problems)} problems:{lines}"
