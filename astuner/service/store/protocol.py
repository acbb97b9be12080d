"""The `Store` protocol: tables of keys to bytes, and writes that happen wholly or not at all.

The service is the only writer and keeps what it needs in memory; a store is read
when the server starts, and for results when they are asked for. Synchronous: a
write takes microseconds (SQLite without fsync) to a fraction of a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Row:
    """One entry; `value` None stands for its deletion."""

    table: str
    key: str
    value: bytes | None


class Store(Protocol):
    """Every method raises CheckpointError when the disk or the other server fails."""

    def write(self, rows: Sequence[Row]) -> None:
        """All of them, or none. Survives the process (not a power cut) once it returns."""
        ...

    def read(self, table: str, key: str) -> bytes | None: ...

    def scan(self, table: str) -> Iterator[tuple[str, bytes]]:
        """Every (key, value) of a table, in no particular order."""
        ...

    def close(self) -> None: ...
