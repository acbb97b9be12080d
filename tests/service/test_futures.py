"""Answers that a store took late."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from astuner.errors import CheckpointError
from astuner.service.futures import SLICE_BYTES, SLICE_ROWS, Answer, FutureBook
from astuner.service.records import FutureRecord
from astuner.service.store.memory import MemoryStore
from astuner.service.store.protocol import Row


class SlowStore(MemoryStore):
    """One that is away for a time, and then takes so many writes, none of which may be large."""

    def __init__(self) -> None:
        super().__init__()
        self.takes = 1_000_000
        self.written: list[list[Row]] = []

    def write(self, rows: Sequence[Row]) -> None:
        large = len(rows) > SLICE_ROWS or sum(len(r.value or b"") for r in rows) > SLICE_BYTES
        if self.takes == 0 or (large and len(rows) > 3):
            raise CheckpointError("Timeout.")
        self.takes -= 1
        self.written.append(list(rows))
        super().write(rows)


def answered(book: FutureBook, name: str, nbytes: int = 10) -> None:
    """As an operation of a run is: three rows."""
    book.open(FutureRecord(name, "alice", "s", "run", "step", "", 0.0))
    book.done(name, Answer(bytes(nbytes)), also=[Row("runs", f"run-{name}", name.encode())])


def names(store: SlowStore) -> list[set[str]]:
    """The answers of each write."""
    return [{row.key.removeprefix("run-") for row in rows} for rows in store.written]


async def test_a_long_outage_is_made_up_for_a_slice_at_a_time() -> None:
    store = SlowStore()
    book = FutureBook(store)
    store.takes = 0
    for number in range(250):
        answered(book, str(number))
    store.takes, turns = 1_000_000, 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    await book.mend()
    task.cancel()
    assert [len(rows) for rows in store.written] == [99] * 7 + [57]
    assert sum(map(len, names(store))) == 250  # every answer in one write
    assert turns >= 7  # the server was not held up
    assert dict(store.scan("runs")) == {f"run-{n}": str(n).encode() for n in range(250)}
    assert len(list(store.scan("results"))) == len(list(store.scan("futures"))) == 250
    store.written.clear()
    await book.mend()
    assert store.written == []


async def test_large_answers_are_written_by_themselves() -> None:
    store = SlowStore()
    book = FutureBook(store)
    store.takes = 0
    for name, nbytes in {"a": 10, "b": SLICE_BYTES * 2, "c": SLICE_BYTES - 9000, "d": 10}.items():
        answered(book, name, nbytes)
    store.takes = 1_000_000
    await book.mend()
    assert names(store) == [{"a"}, {"b"}, {"c", "d"}]


async def test_a_store_that_goes_away_again_keeps_what_it_took() -> None:
    store = SlowStore()
    book = FutureBook(store)
    store.takes = 0
    for number in range(100):
        answered(book, str(number))
    store.takes = 2
    with pytest.raises(CheckpointError):
        await book.mend()
    assert len(list(store.scan("results"))) == 66
    assert book.answer(book.find("99", "alice")).body == bytes(10)
    store.takes = 1_000_000
    await book.mend()
    assert [len(rows) for rows in store.written] == [99, 99, 99, 3]
    assert len(list(store.scan("results"))) == 100


async def test_what_is_written_meanwhile_is_newer_than_what_was_late() -> None:
    store = SlowStore()
    book = FutureBook(store)
    store.takes = 0
    answered(book, "1")
    store.takes = 1_000_000
    book.write([Row("runs", "run-1", b"newer")])
    await book.mend()
    assert list(store.scan("runs")) == [("run-1", b"newer")]
    assert len(list(store.scan("results"))) == 1
