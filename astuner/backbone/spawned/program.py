"""Whose processes are spawned: the words for them, and where they print."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    name: str
    """The backbone's, and what people call it."""
    trainer: str
    """In the title of the process that its trainer runs in."""

    @property
    def log(self) -> str:
        """The file, in the run's folder for it, with all that its processes print."""
        return f"{self.name}.log"
