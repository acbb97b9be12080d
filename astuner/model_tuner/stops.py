"""Stop strings over an engine that only knows stop tokens.

The decoded tail is watched after every token; the text handed to the client is
cut before the stop string, while the call keeps the tokens that spelled it.
"""

from __future__ import annotations

from collections.abc import Sequence

from astuner.chat.protocol import ChatCodec

SLACK = 16
"""Tokens beyond the stop string's bytes: special ones, or parts of a character."""


class StopStrings:
    """Tells after which token a stop string is complete."""

    def __init__(self, stops: Sequence[str], codec: ChatCodec) -> None:
        self._stops = tuple(stops)
        self._codec = codec
        # Every token spells at least a byte, so a stop string fits into this many.
        self._window = max((len(s.encode()) for s in stops), default=0) + SLACK

    def __bool__(self) -> bool:
        return bool(self._stops)

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether the text of `ids` contains a stop string near its end."""
        tail = self._codec.decode(ids[-self._window :], skip_special=False)
        return any(stop in tail for stop in self._stops)

    def cut(self, text: str) -> tuple[str, str | None]:
        """`text` up to the first stop string, and which that was."""
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        at, stop = min(found, default=(len(text), None))
        return text[:at], stop

    @property
    def hold_back(self) -> int:
        """Characters at the end of a growing text that may still become a stop string."""
        return max((len(stop) for stop in self._stops), default=1) - 1
