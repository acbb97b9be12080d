"""Answers that come later: every request that a future stands for, and its result.

A future is opened when the request is accepted and answered exactly once; its result may
be fetched any number of times until it is too old. Open futures and answers are in the
store, so a new server knows what the old one had promised. Only the tenant who asked
finds a future; nothing here changes one on behalf of somebody else.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from astuner.errors import CheckpointError, RequestError
from astuner.service.records import RESULTS, Category, FutureRecord, parse, row
from astuner.service.store.protocol import Row, Store

logger = logging.getLogger(__name__)

SLICE_ROWS = 100
SLICE_BYTES = 2 * 2**20
"""What of late rows is written at once: a store may take a second at most."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request came to."""

    body: bytes
    content_type: str = "application/json"


class FutureBook:
    """All futures of the server. Lives on the server's loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._records: dict[str, FutureRecord] = {}
        self._answered: dict[str, asyncio.Event] = {}
        self._late: dict[tuple[str, str], Row] = {}
        """Rows that the store would not take, the newest of each key; those of one answer lie
        side by side, the record of its future first."""
        self._told_at: dict[str, float] = {}
        """When a failure was first fetched: from then on its user knows."""

    # ------------------------------------------------------------ asking

    def open(self, record: FutureRecord) -> bool:
        """A request has been accepted. False when it is a repetition of one already here.

        Raises RequestError (400) when its number belongs to another request.
        """
        known = self._records.get(record.request_id)
        if known is not None:
            if (known.digest, known.tenant) == (record.digest, record.tenant):
                return False
            raise RequestError(
                f"The number of request {record.request_id} was used already, for another "
                "request. Numbers may be repeated only to send the very same request again.",
                code="number_reused",
                param="seq_id",
            )
        self._records[record.request_id] = record
        self._answered[record.request_id] = asyncio.Event()
        self.write([row(record)])
        return True

    def known(self, request_id: str) -> bool:
        return request_id in self._records

    def find(self, request_id: str, tenant: str) -> FutureRecord:
        """Raises RequestError (404) for one that is not the tenant's."""
        record = self._records.get(request_id)
        if record is None or record.tenant != tenant:
            raise RequestError(
                f"There is no request {request_id[:100]!r}, or its result was given up long ago.",
                status=404,
                code="no_such_request",
            )
        return record

    async def wait(self, request_id: str, tenant: str, seconds: float) -> FutureRecord:
        """The record once it is answered, or as it is when the time is over."""
        record = self.find(request_id, tenant)
        event = self._answered.get(request_id)
        if record.status == "pending" and event is not None:
            try:
                await asyncio.wait_for(event.wait(), seconds)
            except TimeoutError:
                return record
        record = self.find(request_id, tenant)
        if record.status == "failed":
            self._told_at.setdefault(request_id, time.monotonic())
        return record

    def told_at(self, request_id: str) -> float:
        """When (monotonic) the failure was first fetched; infinite before that."""
        return self._told_at.get(request_id, math.inf)

    def answer(self, record: FutureRecord) -> Answer:
        """The result of a future that is done."""
        late = self._late.get((RESULTS, record.request_id))
        body = late.value if late else self._store.read(RESULTS, record.request_id)
        if body is None:
            raise RequestError(
                f"The result of request {record.request_id} was lost with an earlier server.",
                status=410,
                code="result_lost",
            )
        return Answer(body, record.content_type)

    # ------------------------------------------------------------ answering

    def done(self, request_id: str, answer: Answer, also: Sequence[Row] = ()) -> None:
        """The result; `also` is written together with it, or not at all."""
        record = self._records.get(request_id)
        if record is None or record.status != "pending":
            return
        now = time.time()
        record = replace(record, status="done", answered_at=now, content_type=answer.content_type)
        self.write([row(record), Row(RESULTS, request_id, answer.body), *also])
        self._settle(record)

    def fail(
        self, request_id: str, error: str, category: Category, also: Sequence[Row] = ()
    ) -> bool:
        """The request came to nothing, and why. False where it was answered already."""
        record = self._records.get(request_id)
        if record is None or record.status != "pending":
            return False
        now = time.time()
        record = replace(record, status="failed", answered_at=now, error=error, category=category)
        self.write([row(record), *also])
        self._settle(record)
        return True

    def is_pending(self, request_id: str) -> bool:
        record = self._records.get(request_id)
        return record is not None and record.status == "pending"

    def lose(self, request_id: str) -> None:
        """A stopped server did not get to it, and the client may ask again."""
        record = self._records.get(request_id)
        if record is not None and record.status == "pending":
            record = replace(record, status="lost", answered_at=time.time())
            self.write([row(record)])
            self._settle(record)

    def _settle(self, record: FutureRecord) -> None:
        self._records[record.request_id] = record
        event = self._answered.pop(record.request_id, None)
        if event is not None:
            event.set()

    def write(self, rows: Sequence[Row]) -> None:
        """Rows of answers, and whatever else is written under their keys: a late row would undo it.
        A store that does not take it is no reason to fail a request that was computed: the
        answer is then kept in memory until `mend`, and only a restart before would lose it."""
        for late in rows:
            self._late.pop((late.table, late.key), None)
        try:
            self._store.write(rows)
        except CheckpointError as error:
            logger.error("%s Answers are kept in memory only until this is mended.", error)
            self._late |= {(r.table, r.key): r for r in rows}

    # ------------------------------------------------------------ over time

    def load(self) -> list[FutureRecord]:
        """Read what an earlier server left; returns those that it did not answer."""
        for _, value in self._store.scan("futures"):
            record = parse(FutureRecord, value)
            self._records[record.request_id] = record
            if record.status == "pending":
                self._answered[record.request_id] = asyncio.Event()
        return [r for r in self._records.values() if r.status == "pending"]

    def of(self, owner: str) -> Iterable[FutureRecord]:
        """All futures of a run or sampler that are still known."""
        return [r for r in self._records.values() if r.owner == owner]

    async def mend(self) -> None:
        """Write what the store would not take earlier, the oldest first and a slice at a time, for
        there may be any amount of it. Raises CheckpointError while the store still does not."""
        count = 0
        while rows := self._oldest_late():
            self._store.write(rows)
            for written in rows:
                del self._late[written.table, written.key]
            count += len(rows)
            await asyncio.sleep(0)
        if count:
            logger.info("%d records that were late are written.", count)

    def _oldest_late(self) -> list[Row]:
        """As many late rows as are written at once, and no part of an answer."""
        rows, nbytes, whole = list[Row](), 0, 0
        for late in self._late.values():
            if late.table == "futures":
                whole = len(rows)
            rows.append(late)
            nbytes += len(late.value or b"")
            if whole and (len(rows) > SLICE_ROWS or nbytes > SLICE_BYTES):
                return rows[:whole]
        return rows

    def purge(self, answered_before: float) -> int:
        """Give up answers older than this; returns how many."""
        old = [
            r.request_id
            for r in self._records.values()
            if r.status != "pending" and r.answered_at < answered_before
        ]
        for request_id in old:
            del self._records[request_id]
            self._told_at.pop(request_id, None)
        if old:
            self.write([Row(table, key, None) for key in old for table in ("futures", RESULTS)])
        return len(old)

    @property
    def pending(self) -> int:
        return len(self._answered)
