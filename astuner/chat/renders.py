"""Prompts that were rendered a moment ago.

The episodes of a group ask the same thing at the same time; the text and the ids of it
need be made only once. Known by the exact messages and tools, in their JSON, and by the
minute, as a template may show date and time; what is refused is not remembered. Renders
nothing itself. Safe to use from any thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from astuner.chat.protocol import Message, Tool
from astuner.types import TokenIds

REMEMBERED = 64
"""The latest prompts."""


class Render(Protocol):
    def __call__(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> TokenIds: ...


def remembering(render: Render) -> Render:
    """`render`, whose results, which cannot be written to, are remembered."""

    @lru_cache(REMEMBERED)
    def rendered(asked: str, minute: int) -> TokenIds:
        ids = render(*json.loads(asked))
        ids.flags.writeable = False
        return ids

    def remembered(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> TokenIds:
        return rendered(json.dumps([messages, tools]), int(time.time() // 60))

    return remembered
