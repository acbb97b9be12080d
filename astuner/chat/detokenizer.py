"""Text of a growing reply, piece by piece.

The pieces never split a character and join to exactly the text of all ids. Knows no stop
tokens and no tool calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from astuner.chat.protocol import ChatCodec

_NO_CHARACTER = "\ufffd"
"""How a tokenizer shows bytes that are no character (yet)."""


class Detokenizer:
    """Feed ids to `push`, and call `finish` at the end.

    Each step decodes only a short window: the ids of the last piece, which give the new
    ones their context (some tokenizers drop a leading space), and those after it. A piece
    is held back while a further byte could still change it: until its last character is
    whole, and for tokenizers that spell rare words in bytes, until the spelling ends.
    """

    def __init__(self, codec: ChatCodec, *, skip_special: bool = True) -> None:
        self._codec = codec
        self._skip_special = skip_special
        self._window: list[int] = []
        self._told = 0
        """How many ids of the window are already told."""
        emoji = codec.encode("\N{SLIGHTLY SMILING FACE}").tolist()
        self._stray_byte = [i for i in emoji if codec.decode([i]) == _NO_CHARACTER][:1]

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; "" while it may still change."""
        self._window += ids
        text = self._new_text(self._window)
        disturbed = self._new_text([*self._window, *self._stray_byte])
        if text.endswith(_NO_CHARACTER) or not disturbed.startswith(text):
            return ""
        return self._tell(text)

    def finish(self) -> str:
        """What was held back."""
        return self._tell(self._new_text(self._window))

    def _new_text(self, window: list[int]) -> str:
        return self._decode(window)[len(self._decode(window[: self._told])) :]

    def _tell(self, text: str) -> str:
        if text:
            self._window = self._window[self._told :]
            self._told = len(self._window)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._codec.decode(ids, skip_special=self._skip_special)
