"""Which recorded call does each call continue?

One whose prompt + completion its own prompt starts with, token for token: the recorded
parent or the agent's previous call where that holds, else the longest such call, found
by the hash of every prefix that is as long as some call. Linear in the tokens of all
prompts (hashing takes several times as long as comparing), and blind to what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astuner.types import Call, TokenIds

_BLOCK = 8192
"""Tokens hashed at a time: few enough for the processor's cache."""
_ENDS = 16
"""With how many ends of conversations a prompt is compared before it is hashed."""


def length(call: Call) -> int:
    """Tokens of prompt and completion together."""
    return len(call.prompt_ids) + len(call.completion_ids)


def starts_with(ids: TokenIds, call: Call) -> bool:
    """Whether `ids` begins with exactly the call's prompt + completion."""
    middle = len(call.prompt_ids)
    end = middle + len(call.completion_ids)
    # The completion first: it is short, and what differs mostly differs there.
    return (
        end <= len(ids)
        and not np.count_nonzero(ids[middle:end] != call.completion_ids)
        and not np.count_nonzero(ids[:middle] != call.prompt_ids)
    )


def find_parents(calls: Sequence[Call]) -> list[int | None]:
    """For each call the index of its parent, if any; `calls` are in order of their start.

    Among calls with equal tokens the recorded parent is taken, else the latest.
    """
    parents: list[int | None] = []
    by_id: dict[str, int] = {}
    previous: dict[tuple[str, str], int] = {}
    index: _PrefixIndex | None = None
    for i, call in enumerate(calls):
        key = (call.agent_name, call.target_tag)
        parent = by_id.get(call.parent_id or "")
        if parent is None or not starts_with(call.prompt_ids, calls[parent]):
            parent = previous.get(key)
            if parent is None or not starts_with(call.prompt_ids, calls[parent]):
                parent = None
                if parents:  # most episodes are one call: nothing to look for
                    index = index or _PrefixIndex(calls)
                    parent = index.longest_prefix(call.prompt_ids, parents)
        parents.append(parent)
        by_id[call.call_id] = previous[key] = i
    return parents


class _PrefixIndex:
    """Calls by the hash of their tokens; none is hashed before it may be the one looked for.

    hash(ids) = sum of (ids[t] + 1) * weight[t] modulo 2^64: the hashes of all prefixes of a
    prompt are one running sum, and a call's follows from its parent's in the time of the
    new tokens alone. The weights of a block of tokens are random, and multiplied by another
    odd number in each block, so that they take no memory that grows with the prompts.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        ends = np.fromiter(map(length, calls), np.int64, len(calls))
        longest, bits = int(ends.max()), (2 * len(calls)).bit_length()
        self._calls = calls
        self._weights = np.random.default_rng(0).integers(2**63, size=min(longest, _BLOCK)) | 1
        self._is_an_end = np.zeros(longest + 1, np.bool_)
        """Whether some call is exactly so many tokens long."""
        self._is_an_end[ends] = True
        self._hashes = np.zeros(len(calls), np.int64)
        self._hashed = 0
        self._ends: dict[int, None] = {}
        """The latest calls that no other continues."""
        self._shift = 64 - bits
        self._latest = np.full(2**bits, -1, np.int32)
        """By the upper bits of a hash, the latest call that has them, or -1."""
        self._earlier = np.full(len(calls), -1, np.int32)
        """The call before this one with the same upper bits, or -1."""

    def longest_prefix(self, ids: TokenIds, parents: Sequence[int | None]) -> int | None:
        """Among the calls whose `parents` are known."""
        if not self._is_an_end[1 : len(ids) + 1].any():
            return None
        for i in range(self._hashed, len(parents)):
            self._add(i, parents[i])
        self._hashed = len(parents)
        near = self._end_within(ids)
        done = 0 if near is None else length(self._calls[near])
        total = 0 if near is None else int(self._hashes[near])
        found = [np.full(1, total)]
        for at, hashes in self._running(ids[done:], done, total):
            hashes = hashes[self._is_an_end[at + 1 : at + 1 + len(hashes)]]
            found.append(hashes[self._latest[self._upper_bits(hashes)] >= 0])
        for total in np.concatenate(found)[::-1]:
            i = int(self._latest[self._upper_bits(total)])
            while i >= 0:
                if self._hashes[i] == total and (i == near or starts_with(ids, self._calls[i])):
                    return i
                i = int(self._earlier[i])
        return None

    def _end_within(self, ids: TokenIds) -> int | None:
        """A conversation's last call that `ids` starts with: what it says need not be hashed."""
        for i in reversed(self._ends):
            call, end = self._calls[i], length(self._calls[i])
            alike = end <= len(ids) and ids[end - 1] == call.completion_ids[-1]
            if alike and starts_with(ids, call):
                return i
        return None

    def _add(self, i: int, parent: int | None) -> None:
        call = self._calls[i]
        if not length(call):
            return  # Every prompt starts with it.
        known = 0 if parent is None else length(self._calls[parent])
        total = 0 if parent is None else int(self._hashes[parent])
        new = np.concatenate([call.prompt_ids[known:], call.completion_ids])
        for _, hashes in self._running(new, known, total):
            total = int(hashes[-1])
        self._hashes[i] = total
        place = self._upper_bits(self._hashes[i])
        self._earlier[i] = self._latest[place]
        self._latest[place] = i
        if len(call.completion_ids):
            self._ends.pop(i if parent is None else parent, None)
            self._ends[i] = None
        if len(self._ends) > _ENDS:
            del self._ends[next(iter(self._ends))]

    def _running(
        self, ids: TokenIds, at: int = 0, total: int = 0
    ) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Place of the first and the hashes up to and with each, for every block of `ids`,
        which follow `at` tokens with the hash `total`."""
        while len(ids):
            block, place = divmod(at, _BLOCK)
            part = ids[: _BLOCK - place]
            hashes = (part + 1) * self._weights[place : place + len(part)]
            np.cumsum(hashes, out=hashes)
            hashes *= 2 * block + 1
            hashes += total
            yield at, hashes
            at, total, ids = at + len(part), int(hashes[-1]), ids[len(part) :]

    def _upper_bits(self, hashes: Any) -> Any:
        return (hashes >> self._shift) & (len(self._latest) - 1)
