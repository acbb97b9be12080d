"""A chat format of letters: ids 1 to 15 are "a" to "o", 0 ends a turn; a prompt is the
contents of all messages, one after the other, without anything between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from astuner.chat.protocol import Message, ParsedReply, Tool
from astuner.types import TokenIds, token_ids
from tests.service.unigram import END


class LetterCodec:
    stop_token_ids: tuple[int, ...] = (END,)
    supports_tools = False

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> TokenIds:
        return self.encode("".join(str(m.get("content") or "") for m in messages))

    def extend(
        self,
        prompt_ids: TokenIds,
        completion_ids: TokenIds,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] = (),
    ) -> TokenIds | None:
        return np.concatenate([prompt_ids, completion_ids, self.render(new_messages)])

    def parse(
        self, completion_ids: TokenIds, prompt_ids: TokenIds, tools: Sequence[Tool] = ()
    ) -> ParsedReply:
        return ParsedReply(self.decode(completion_ids), None, ())

    def encode(self, text: str) -> TokenIds:
        return token_ids([ord(c) - ord("a") + 1 for c in text])

    def decode(self, ids: Sequence[int] | TokenIds, *, skip_special: bool = True) -> str:
        return "".join(chr(int(i) + ord("a") - 1) for i in ids if i or not skip_special)
