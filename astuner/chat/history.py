"""Which recorded call does a request continue?

Clients resend the whole conversation each turn. A `History` knows every answered call of
one agent and finds the one whose messages and reply the new request starts with, in time
linear in the request's messages. Matching is by messages (`messages.comparable`); that
the tokens may really be extended is for the codec to prove. Safe to use from any thread.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from astuner.chat.messages import comparable
from astuner.chat.protocol import Message, Tool
from astuner.types import TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """The recorded call that a request continues."""

    prompt_ids: TokenIds
    completion_ids: TokenIds
    history: tuple[Message, ...]
    """What was recorded up to and with the reply; holds its reasoning even where the
    client did not send it back."""
    new_messages: tuple[Message, ...]
    call_id: str


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    call_id: str
    tools: str
    prompt_ids: TokenIds
    completion_ids: TokenIds
    parent: _Entry | None
    """The call that its prompt extends: the history before `messages`."""
    messages: tuple[Message, ...]
    """What came after the parent's reply, and the reply."""

    def conversation(self) -> list[Message]:
        parts: list[tuple[Message, ...]] = []
        entry: _Entry | None = self
        while entry is not None:
            parts.append(entry.messages)
            entry = entry.parent
        return [message for part in reversed(parts) for message in part]


class History:
    """The answered calls of one agent in one episode. All messages are normalised."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[bytes, list[_Entry]] = {}
        """By the chained hash of messages and reply; the latest comes last."""
        self._asked: set[bytes] = set()
        """Chained hashes of the messages of every call, without its reply."""
        self._replies: set[str] = set()

    def match(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Match | None:
        """The latest call that the longest part of `messages` repeats, with equal tools.

        None when there is none, when nothing follows the repeated part, or when another
        assistant message follows it, which was not sampled in that place.
        """
        chain = _chain(messages)
        with self._lock:
            place, entries = self._repeated(chain, messages, _comparable_tools(tools))
        if not entries or any(m["role"] == "assistant" for m in messages[place:]):
            return None
        if place == len(messages):
            return None
        entry = entries[0]
        return Match(
            entry.prompt_ids,
            entry.completion_ids,
            tuple(entry.conversation()),
            tuple(messages[place:]),
            entry.call_id,
        )

    def why_new(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """Why a request that matches nothing needs a new timeline.

        "first": it shares no reply with any recorded call. "tools_changed": only the tools
        differ. "continues_assistant": it ends with an assistant message.
        "edited_history": it shares replies, but the client changed, dropped or added
        something.
        """
        if messages[-1]["role"] == "assistant":
            return "continues_assistant"
        chain = _chain(messages)
        with self._lock:
            place, repeated = self._repeated(chain, messages, None)
            if repeated:
                same, _ = self._repeated(chain, messages, _comparable_tools(tools))
                return "tools_changed" if same < place else "edited_history"
            for before, message in zip([b"", *chain], messages, strict=False):
                told = message["role"] == "assistant"
                if told and (comparable(message) in self._replies or before in self._asked):
                    return "edited_history"
        return "first"

    def add(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        reply_message: Message,
        prompt_ids: TokenIds,
        completion_ids: TokenIds,
        call_id: str,
    ) -> None:
        """Record an answered call."""
        wanted = _comparable_tools(tools)
        *chain, last = _chain([*messages, reply_message])
        with self._lock:
            place, entries = self._repeated(chain, messages, wanted)
            parent = next((e for e in entries if _extends(prompt_ids, e)), None)
            own = (*messages[place if parent else 0 :], dict(reply_message))
            entry = _Entry(call_id, wanted, prompt_ids, completion_ids, parent, own)
            self._entries.setdefault(last, []).append(entry)
            self._asked.add(chain[-1])
            self._replies.add(comparable(reply_message))

    def _repeated(
        self, chain: Sequence[bytes], messages: Sequence[Message], tools: str | None
    ) -> tuple[int, list[_Entry]]:
        """How many messages the longest recorded calls cover that `messages` repeat, and
        these calls, the latest first; with any tools where `tools` is None."""
        for place in range(len(chain), 0, -1):
            entries = [
                entry
                for entry in reversed(self._entries.get(chain[place - 1], ()))
                if tools in (None, entry.tools) and _same_reasoning(entry, messages)
            ]
            if entries:
                return place, entries
        return 0, []


def _chain(messages: Sequence[Message]) -> list[bytes]:
    """One hash for each start of the conversation."""
    hashes: list[bytes] = []
    running = hashlib.blake2b(digest_size=16)
    for message in messages:
        running.update(comparable(message).encode() + b"\0")
        hashes.append(running.digest())
    return hashes


def _same_reasoning(entry: _Entry, messages: Sequence[Message]) -> bool:
    """Reasoning may be left out of what the client sends back, but not be another one."""
    if not any(m.get("reasoning_content") for m in messages):
        return True
    return all(
        not sent.get("reasoning_content")
        or sent["reasoning_content"] == known.get("reasoning_content")
        for known, sent in zip(entry.conversation(), messages, strict=False)
    )


def _extends(prompt_ids: TokenIds, entry: _Entry) -> bool:
    middle, end = len(entry.prompt_ids), len(entry.prompt_ids) + len(entry.completion_ids)
    return bool(
        np.array_equal(prompt_ids[:middle], entry.prompt_ids)
        and np.array_equal(prompt_ids[middle:end], entry.completion_ids)
    )


def _comparable_tools(tools: Sequence[Any]) -> str:
    return json.dumps([dict(tool) for tool in tools], sort_keys=True)
