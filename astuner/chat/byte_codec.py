"""A codec without a tokenizer: ids 0..255 are bytes, 256 starts and 257 ends a turn.

For the scripted fake of the debug backbone and for tests: ids can be written down by
hand. ChatML in shape; tools are shown as JSON in a leading system turn, `<think>` and
`<tool_call>` are parsed. No model was ever trained on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from astuner.chat.protocol import Message, ParsedReply, Tool
from astuner.types import TokenIds, token_ids

START, END = 256, 257
SPECIAL = {START: "<|im_start|>", END: "<|im_end|>"}


def ids(text: str) -> list[int]:
    """Text as ids, with "⟦" and "⟧" for the two turn tokens."""
    out: list[int] = []
    for char in text:
        out += [START] if char == "⟦" else [END] if char == "⟧" else list(char.encode())
    return out


class ByteCodec:
    stop_token_ids: tuple[int, ...] = (END,)
    supports_tools = True

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> TokenIds:
        out: list[int] = []
        if tools:
            out += ids(f"⟦system\n{json.dumps([dict(t) for t in tools])}⟧\n")
        for message in messages:
            out += self._turn(message)
        return token_ids([*out, *ids("⟦assistant\n")])

    def extend(
        self,
        prompt_ids: TokenIds,
        completion_ids: TokenIds,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] = (),
    ) -> TokenIds | None:
        closed = len(completion_ids) > 0 and completion_ids[-1] == END
        delta = [] if closed else [END]
        delta += ids("\n")
        for message in new_messages:
            delta += self._turn(message)
        delta += ids("⟦assistant\n")
        return np.concatenate([prompt_ids, completion_ids, token_ids(delta)])

    def parse(
        self, completion_ids: TokenIds, prompt_ids: TokenIds, tools: Sequence[Tool] = ()
    ) -> ParsedReply:
        text, reasoning, calls = self.decode(completion_ids), None, list[dict[str, Any]]()
        if text.startswith("<think>"):
            reasoning, _, text = text.removeprefix("<think>").partition("</think>")
        for found in re.findall(r"<tool_call>(.*?)</tool_call>", text) if tools else ():
            call = json.loads(found)
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
            calls.append({"id": f"call_{len(calls)}", "type": "function", "function": function})
        if calls:
            text = text.partition("<tool_call>")[0]
        return ParsedReply(text.strip(), reasoning, tuple(calls))

    def encode(self, text: str) -> TokenIds:
        return token_ids(list(text.encode()))

    def decode(self, ids: Sequence[int] | TokenIds, *, skip_special: bool = True) -> str:
        raw = b""
        for token in ids:
            special = SPECIAL.get(int(token))
            raw += bytes([token]) if special is None else b"" if skip_special else special.encode()
        return raw.decode(errors="replace")

    @staticmethod
    def _turn(message: Message) -> list[int]:
        calls = "".join(
            f"<tool_call>{json.dumps(call['function'])}</tool_call>"
            for call in message.get("tool_calls", ())
        )
        return ids(f"⟦{message['role']}\n{message['content']}{calls}⟧\n")
