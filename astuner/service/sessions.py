"""Sessions: one for each client, kept alive by its heartbeats.

A session that is silent for too long is over; what it held is given back by whoever asks
`overdue`. Heartbeats are not stored: after a restart every session gets its full time.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from astuner.errors import CheckpointError, RequestError
from astuner.service.limits import Limits
from astuner.service.records import SessionRecord, parse, row
from astuner.service.store.protocol import Store

logger = logging.getLogger(__name__)


class SessionBook:
    """All sessions of the server."""

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store = store
        self._limits = limits
        self._records: dict[str, SessionRecord] = {}
        self._seen: dict[str, float] = {}

    def load(self) -> None:
        """Read what an earlier server left."""
        for _, value in self._store.scan("sessions"):
            record = parse(SessionRecord, value)
            self._records[record.session_id] = record
            self._seen[record.session_id] = time.monotonic()

    def add(self, record: SessionRecord) -> None:
        """Raises RequestError (400) when the tenant has too many."""
        living = sum(not r.ended for r in self.of_tenant(record.tenant))
        if living >= self._limits.max_sessions:
            raise RequestError(
                f"You have {living} sessions, as many as this server allows. Close clients that "
                f"you no longer need; silent ones end after {self._limits.session_timeout:g} s.",
                code="quota_exceeded",
            )
        self._store.write([row(record)])
        self._records[record.session_id] = record
        self._seen[record.session_id] = time.monotonic()

    def find(self, session_id: str, tenant: str) -> SessionRecord:
        """Raises RequestError (404) for one that is not the tenant's."""
        record = self._records.get(session_id)
        if record is None or record.tenant != tenant:
            raise RequestError(
                f"There is no session {session_id[:100]!r}.", status=404, code="no_such_session"
            )
        return record

    def alive(self, session_id: str, tenant: str) -> SessionRecord:
        """`find`, and a sign of life. Raises RequestError (410) when it is over."""
        record = self.find(session_id, tenant)
        if record.ended:
            raise RequestError(
                f"Session {session_id} is over: {record.ended}. Make a new ServiceClient; saved "
                "checkpoints are still there.",
                status=410,
                code="session_ended",
            )
        self._seen[session_id] = time.monotonic()
        return record

    def end(self, session_id: str, reason: str) -> None:
        """Also when the store fails: a new server then finds it living, and ends it in time."""
        record = replace(self._records[session_id], ended=reason)
        try:
            self._store.write([row(record)])
        except CheckpointError as error:
            logger.error("%s", error)
        self._records[session_id] = record
        self._seen.pop(session_id, None)

    def overdue(self) -> list[SessionRecord]:
        """Those that nobody kept alive."""
        limit = time.monotonic() - self._limits.session_timeout
        return [self._records[key] for key, seen in self._seen.items() if seen < limit]

    def of_tenant(self, tenant: str) -> list[SessionRecord]:
        """Newest first."""
        mine = [r for r in self._records.values() if r.tenant == tenant]
        return sorted(mine, key=lambda r: r.created_at, reverse=True)
