"""A process that saves one checkpoint over and over, and says so, until it is killed.

`python saving_process.py FOLDER`: before each save it writes nothing; after it the number.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from astuner.service.checkpoints import CheckpointBook
from astuner.service.names import CheckpointPath
from astuner.service.records import RunRecord, Shape
from astuner.service.snapshots import SnapshotShelf
from astuner.service.store.sqlite import SqliteStore
from tests.service.unigram import UnigramHost

RUN = RunRecord(f"{'0' * 32}:train:0", "s", "alice", "m", Shape(4), 0, 0.0, 0.0)
PATH = CheckpointPath(RUN.run_id, "weights", "again")
FILES = ("a", "b", "c")


def book_in(folder: Path) -> CheckpointBook:
    store = SqliteStore(folder / "records.sqlite")
    shelf = SnapshotShelf(UnigramHost(), folder / "spilled", max_resident=1)
    book = CheckpointBook(store, folder / "checkpoints", shelf)
    book.load()
    return book


async def save(book: CheckpointBook, number: int) -> None:
    async def export(folder: Path) -> None:
        folder.mkdir()
        for name in FILES:
            (folder / name).write_text(str(number))

    await book.save(PATH, RUN, export, ttl_seconds=None, overwrite=True)


async def main(folder: Path) -> None:
    book = book_in(folder)
    for number in range(10**9):
        await save(book, number)
        print(number, flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
