"""How much of a growing reply may already be shown to a streaming client.

Shown text cannot be taken back, but the parse of a half-made reply can change: a
`<` may open a tool call, the last characters may become a stop string. So only
what the final parse will surely contain is shown; the rest follows at the end.
Codecs parse whole replies, so parsing again is spaced out as the reply grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from astuner.model_tuner.stops import StopStrings

Read = Callable[[Sequence[int]], tuple[str, str]]
"""Token ids as (reasoning, content), as far as they go."""

MARKUP = "<[{`|"
"""With tools, any of these may open a tool call in one family or another."""
LONGEST_TAG = 16
"""An unfinished `</think>` and its like are shorter than this."""
REPARSE = 32
"""Parse again when the reply has grown by this fraction: linear work in the end."""


class Deltas:
    """The shown part of one reply."""

    def __init__(self, read: Read, stops: StopStrings, *, tools: bool) -> None:
        self._read = read
        self._stops = stops
        self._markup = MARKUP if tools else ""
        self._parsed_at = 0
        self._reasoning = ""
        self._content = ""

    def grow(self, ids: Sequence[int]) -> tuple[str, str]:
        """New (reasoning, content) to show now; often both empty."""
        if len(ids) - self._parsed_at < max(1, len(ids) // REPARSE):
            return "", ""
        self._parsed_at = len(ids)
        reasoning, content = (self._stops.cut(part)[0] for part in self._read(ids))
        # As long as there is no content, the reasoning may not be over.
        return self._advance(
            reasoning.rstrip() if content else self._settled(reasoning, ""),
            self._settled(content, self._markup),
        )

    def rest(self, reasoning: str, content: str) -> tuple[str, str]:
        """What is left to show of the finished reply."""
        return self._advance(reasoning, content)

    def _advance(self, reasoning: str, content: str) -> tuple[str, str]:
        new_reasoning = _beyond(self._reasoning, reasoning)
        new_content = _beyond(self._content, content)
        self._reasoning += new_reasoning
        self._content += new_content
        return new_reasoning, new_content

    def _settled(self, text: str, markup: str) -> str:
        text = text[: min((at for at in map(text.find, markup) if at >= 0), default=None)]
        tag = text.rfind("<", max(0, len(text) - LONGEST_TAG))
        if tag >= 0:
            text = text[:tag]
        if self._stops.hold_back:
            text = text[: -self._stops.hold_back]
        # The last character may be incomplete, and parsers strip the ends of a part.
        return text.rstrip("\ufffd").rstrip()


def _beyond(shown: str, text: str) -> str:
    """What `text` adds to what is shown; nothing while it does not begin with it."""
    return text[len(shown) :] if text.startswith(shown) else ""
