"""When a consumer is woken, and what it then finds."""

from __future__ import annotations

import asyncio

import pytest

from astuner.engine.embedded.mailbox import Mailbox, Outbox
from astuner.engine.protocol import TokenChunk
from astuner.errors import EngineError


def chunk(token: int, *, last: bool = False, version: int = 0) -> TokenChunk:
    return TokenChunk((token,), (-0.5,), version, "length" if last else None)


async def deliver(mailbox: Mailbox, item: TokenChunk | EngineError) -> None:
    """One tick of the device thread, and the turn of the loop after it."""
    outbox = Outbox()
    outbox.put(mailbox, item)
    await asyncio.to_thread(outbox.flush)
    await asyncio.sleep(0)


async def test_a_reader_is_woken_with_each_chunk() -> None:
    mailbox = Mailbox()
    for token in (1, 2):
        reading = asyncio.create_task(mailbox.take())
        await deliver(mailbox, chunk(token))
        assert (await reading).token_ids == (token,)


async def test_who_wants_the_whole_reply_is_woken_at_its_end() -> None:
    mailbox = Mailbox(whole=True)
    reading = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)  # it waits
    await deliver(mailbox, chunk(1))
    await deliver(mailbox, chunk(2))
    assert not reading.done()
    await deliver(mailbox, chunk(3, last=True))
    whole = await reading
    assert (whole.token_ids, whole.finish_reason) == ((1, 2, 3), "length")


async def test_tokens_of_two_versions_stay_two_chunks() -> None:
    mailbox = Mailbox(whole=True)
    await deliver(mailbox, chunk(1))
    await deliver(mailbox, chunk(2, last=True, version=1))
    assert [(await mailbox.take()).weight_version for _ in range(2)] == [0, 1]


async def test_an_error_wakes_at_once() -> None:
    mailbox = Mailbox(whole=True)
    reading = asyncio.create_task(mailbox.take())
    await deliver(mailbox, EngineError("out of memory"))
    with pytest.raises(EngineError, match="out of memory"):
        await reading
