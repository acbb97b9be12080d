"""A store in one SQLite file (`persistence: file`).

Write-ahead logging without a sync per commit: what was written survives the death of
the process, though not a power cut. The file is locked for as long as it is open, so
that two servers never share a data folder.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from astuner.errors import CheckpointError, ConfigError
from astuner.service.store.protocol import Row

VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
  "table" TEXT NOT NULL, "key" TEXT NOT NULL, "value" BLOB NOT NULL,
  PRIMARY KEY ("table", "key")
) WITHOUT ROWID
"""


class SqliteStore:
    """See `protocol.Store`."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError when another server has the file, or it is of another version."""
        self._path = path
        self._lock = threading.Lock()
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=2.0, isolation_level=None, check_same_thread=False
            )
        try:
            self._open()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("BEGIN EXCLUSIVE")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            self._db.execute(_SCHEMA)
            self._db.execute(f"PRAGMA user_version={VERSION}")
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise self._failed(error) from error
            raise ConfigError(
                f"service.data_dir: {self._path} is in use by another server. Stop that one, or "
                "give this one a data_dir of its own."
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._failed(error) from error
        if version not in (0, VERSION):
            raise ConfigError(
                f"service.data_dir: {self._path} was written by another version of astuner "
                f"(format {version}, this one reads {VERSION}). Use another data_dir."
            )

    def write(self, rows: Sequence[Row]) -> None:
        with self._lock, self._told():
            self._db.execute("BEGIN")
            try:
                for row in rows:
                    self._put(row)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _put(self, row: Row) -> None:
        if row.value is None:
            query = 'DELETE FROM entries WHERE "table" = ? AND "key" = ?'
            self._db.execute(query, (row.table, row.key))
        else:
            query = "INSERT OR REPLACE INTO entries VALUES (?, ?, ?)"
            self._db.execute(query, (row.table, row.key, row.value))

    def read(self, table: str, key: str) -> bytes | None:
        query = 'SELECT "value" FROM entries WHERE "table" = ? AND "key" = ?'
        with self._lock, self._told():
            found = self._db.execute(query, (table, key)).fetchone()
        return None if found is None else found[0]

    def scan(self, table: str) -> Iterator[tuple[str, bytes]]:
        query = 'SELECT "key", "value" FROM entries WHERE "table" = ?'
        with self._lock, self._told():
            rows = self._db.execute(query, (table,)).fetchall()
        yield from rows

    def close(self) -> None:
        with self._lock, self._told():
            self._db.close()

    @contextmanager
    def _told(self) -> Generator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"The service's records in {self._path} cannot be read or written: {error}. Is the "
            "disk full, or the folder read-only?"
        )
