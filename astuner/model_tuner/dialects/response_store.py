"""Answers of the Responses API that may be read or continued later.

They belong to the session, as all agents of an episode may share a conversation, and are
gone with it. Knows no HTTP.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from astuner.model_tuner.session import Session

REMEMBERED = 4096
"""Responses of one session; an episode has far fewer, but a served model never ends."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One answered request."""

    payload: dict[str, Any]
    messages: tuple[dict[str, Any], ...]
    """Input and answer as chat messages, without instructions."""


class ResponseStore:
    """The stored responses of all sessions; gone with the session. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: WeakKeyDictionary[Session, OrderedDict[str, Stored]] = WeakKeyDictionary()

    def put(self, session: Session, response_id: str, stored: Stored) -> None:
        with self._lock:
            responses = self._of.setdefault(session, OrderedDict())
            responses[response_id] = stored
            while len(responses) > REMEMBERED:
                responses.popitem(last=False)

    def find(self, session: Session, response_id: str) -> Stored | None:
        with self._lock:
            return self._of.get(session, {}).get(response_id)

    def drop(self, session: Session, response_id: str) -> None:
        with self._lock:
            self._of.get(session, {}).pop(response_id, None)
