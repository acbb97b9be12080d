"""An endpoint of another dialect in front of a chat endpoint, and what a dialect provides.

`Translated` hands the chat endpoint an exchange whose request is the translated one and
whose answers are translated back as they are given. Retries are told apart by the request
as it came.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from astuner.model_tuner.dialects.parts import Change, Parts
from astuner.model_tuner.exchange import Endpoint, Exchange
from astuner.model_tuner.session import AgentKey, SessionBook
from astuner.model_tuner.sse import EventStream
from astuner.model_tuner.wire import ErrorShape

Event = tuple[str, dict[str, Any]]
"""The name and the data of a server-sent event."""


class Translation(ABC):
    """One request of a dialect: as a chat request, and its answer on the way back."""

    def __init__(self, body: dict[str, Any], *, reasoning: bool = True) -> None:
        self.body = body
        """The chat request."""
        self.parts = Parts(reasoning=reasoning)
        self.id = ""
        """The chat answer's, without its prefix."""
        self.model = ""
        self.finish = ""
        self.stop: str | None = None
        """The stop string that ended the answer, where the endpoint tells."""
        self.usage: Mapping[str, Any] = {}
        self.logprobs: list[dict[str, Any]] = []
        """Chat's, one row for each token so far."""

    def answer(self, response: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        self._note(response, response["choices"][0])
        for _ in self.parts.feed(response["choices"][0].get("message") or {}):
            pass
        for _ in self.parts.end(complete=self.complete):
            pass
        return self.whole()

    def chunk(self, chunk: Mapping[str, Any]) -> Iterator[Event]:
        """The events that follow from a chunk."""
        begun = bool(self.id)
        choice = next((c for c in chunk.get("choices") or () if c.get("index", 0) == 0), None)
        self._note(chunk, choice or {})
        if choice is None:
            return
        if not begun:
            yield from self.begun()
        for change in self.parts.feed(choice.get("delta") or {}):
            yield from self.changed(change)

    def end(self) -> Iterator[Event]:
        """The events after the last chunk."""
        for change in self.parts.end(complete=self.complete):
            yield from self.changed(change)
        yield from self.ended()

    @property
    def complete(self) -> bool:
        """Whether the answer came to an end of its own."""
        return self.finish not in ("length", "content_filter")

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The finished answer as JSON."""

    @abstractmethod
    def begun(self) -> Iterator[Event]:
        """The first events of a stream."""

    @abstractmethod
    def changed(self, change: Change) -> Iterator[Event]:
        """The events of one change."""

    @abstractmethod
    def ended(self) -> Iterator[Event]:
        """The last events of a stream, when every part is closed."""

    def _note(self, given: Mapping[str, Any], choice: Mapping[str, Any]) -> None:
        """Take what stands around the delta or message."""
        if choice:
            self.id = self.id or str(given.get("id") or "0").removeprefix("chatcmpl-")
        self.model = given.get("model") or self.model
        self.usage = given.get("usage") or self.usage
        self.finish = choice.get("finish_reason") or self.finish
        stop = choice.get("stop_reason")
        self.stop = stop if isinstance(stop, str) else self.stop
        self.logprobs += (choice.get("logprobs") or {}).get("content") or []


class Dialect(ABC):
    """How one dialect asks, and how it tells errors."""

    errors: ErrorShape

    @abstractmethod
    def translate(self, agent: AgentKey, data: Mapping[str, Any]) -> Translation:
        """A request's JSON, understood. Raises RequestError in the dialect's own terms."""


class Translated(Endpoint):
    """The dialect's endpoint."""

    def __init__(self, dialect: Dialect, chat: Endpoint, sessions: SessionBook) -> None:
        super().__init__(sessions)
        self._dialect = dialect
        self._chat = chat
        self.errors = dialect.errors

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        translation = self._dialect.translate(agent, await exchange.json())
        await self._chat.answer(agent, _TranslatedExchange(exchange, translation))


class _TranslatedExchange(Exchange):
    """What the chat endpoint gets."""

    def __init__(self, outer: Exchange, translation: Translation) -> None:
        super().__init__(*outer.connection)
        self._outer = outer
        self._translation = translation
        self._events = _TranslatedEvents(outer.stream, translation)

    async def json(self) -> dict[str, Any]:
        return self._translation.body

    @property
    def claim(self) -> Any:
        return self._outer.claim

    @property
    def events(self) -> Any:
        return self._events

    async def reply(
        self, payload: Any, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        await self._outer.reply(self._translation.answer(payload), status, headers)


class _TranslatedEvents:
    """Where the chat endpoint's chunks go."""

    def __init__(self, stream: EventStream, translation: Translation) -> None:
        self._stream = stream
        self._translation = translation

    @property
    def started(self) -> bool:
        return self._stream.started

    async def send(self, event: Any) -> None:
        for name, data in self._translation.chunk(event):
            await self._stream.send(data, name)

    async def done(self) -> None:
        for name, data in self._translation.end():
            await self._stream.send(data, name)
        await self._stream.end()
