"""A store that forgets everything with the process (`persistence: none`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from astuner.service.store.protocol import Row


class MemoryStore:
    """See `protocol.Store`."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, bytes]] = {}

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            table = self._tables.setdefault(row.table, {})
            if row.value is None:
                table.pop(row.key, None)
            else:
                table[row.key] = row.value

    def read(self, table: str, key: str) -> bytes | None:
        return self._tables.get(table, {}).get(key)

    def scan(self, table: str) -> Iterator[tuple[str, bytes]]:
        yield from list(self._tables.get(table, {}).items())

    def close(self) -> None:
        """Nothing to close."""
