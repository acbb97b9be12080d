"""Handing tokens from the device thread to consumers on any event loop.

The device thread puts chunks into an `Outbox`; one wake-up per loop and tick
tells the loop's consumers to look. A consumer that is slow finds several chunks
and gets them joined. A loop that was closed cancels its requests and never
harms the device thread. Knows nothing of sampling.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from itertools import chain

from astuner.engine.protocol import TokenChunk
from astuner.errors import EngineError


class Mailbox:
    """One request's chunks. Made, and read, on the consumer's event loop."""

    def __init__(self, *, whole: bool = False) -> None:
        """`whole`: the consumer is woken for the end only."""
        self.whole = whole
        self.loop = asyncio.get_running_loop()
        self.cancelled = False
        """Set by either side: nobody will read on."""
        self._items: deque[TokenChunk | EngineError] = deque()
        self._arrived = asyncio.Event()

    def drop(self, item: TokenChunk | EngineError) -> None:
        """From any thread; `ring` must follow on the loop."""
        self._items.append(item)

    def ring(self) -> None:
        self._arrived.set()

    async def take(self) -> TokenChunk:
        """All chunks that are there, joined where one weight version drew them. Raises the
        error that ended the request."""
        while not self._items:
            self._arrived.clear()
            if not self._items:  # an item may have come before the flag was cleared
                await self._arrived.wait()
        first = self._items.popleft()
        if isinstance(first, EngineError):
            raise first
        return self._join(first)

    def _join(self, first: TokenChunk) -> TokenChunk:
        chunks = [first]
        while self._items:
            item = self._items[0]
            if isinstance(item, EngineError) or item.weight_version != first.weight_version:
                break
            self._items.popleft()
            chunks.append(item)
        if len(chunks) == 1:
            return first
        return replace(
            first,
            token_ids=tuple(chain.from_iterable(c.token_ids for c in chunks)),
            logprobs=tuple(chain.from_iterable(c.logprobs for c in chunks)),
            top_logprobs=tuple(chain.from_iterable(c.top_logprobs for c in chunks)),
            finish_reason=chunks[-1].finish_reason,
        )


class Outbox:
    """What one tick has to deliver. Used on the device thread only."""

    def __init__(self) -> None:
        self._by_loop: dict[asyncio.AbstractEventLoop, list[Mailbox]] = {}

    def put(self, mailbox: Mailbox, item: TokenChunk | EngineError) -> None:
        mailbox.drop(item)
        if mailbox.whole and isinstance(item, TokenChunk) and item.finish_reason is None:
            return
        self._by_loop.setdefault(mailbox.loop, []).append(mailbox)

    def flush(self) -> None:
        """Wake the consumers, once per loop."""
        for loop, mailboxes in self._by_loop.items():
            try:
                loop.call_soon_threadsafe(_ring_all, mailboxes)
            except RuntimeError:  # the loop is closed: nobody is left to read
                for mailbox in mailboxes:
                    mailbox.cancelled = True
        self._by_loop = {}


def _ring_all(mailboxes: list[Mailbox]) -> None:
    for mailbox in mailboxes:
        mailbox.ring()
