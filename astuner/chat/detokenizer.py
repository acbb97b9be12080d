"""Text of a growing reply, piece by piece.

The pieces never split a character and join to exactly the text of all ids. Knows no stop
tokens and no tool calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from astuner.chat.protocol import ChatCodec

_UNFINISHED = "\ufffd"
"""How a tokenizer shows bytes that are no character (yet)."""


class Detokenizer:
    """Feed ids to `push`, and call `finish` at the end.

    Each step decodes only a short window: the ids of the last piece, which give the new
    ones their context (some tokenizers drop a leading space), and those after it.
    """

    def __init__(self, codec: ChatCodec, *, skip_special: bool = True) -> None:
        self._codec = codec
        self._skip_special = skip_special
        self._window: list[int] = []
        self._told = 0
        """How many ids of the window are already told."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; "" while a character is unfinished."""
        self._window += ids
        text = self._new_text()
        return "" if text.endswith(_UNFINISHED) else self._tell(text)

    def finish(self) -> str:
        """What is left: bytes that never became a character."""
        return self._tell(self._new_text())

    def _new_text(self) -> str:
        told = self._decode(self._window[: self._told])
        return self._decode(self._window)[len(told) :]

    def _tell(self, text: str) -> str:
        if text:
            self._window = self._window[self._told :]
            self._told = len(self._window)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._codec.decode(ids, skip_special=self._skip_special)
