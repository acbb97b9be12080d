"""Which recorded call does each call continue?

One whose prompt + completion its own prompt starts with, token for token: the recorded
parent or the agent's previous call where that holds, else the longest such call, found
by the hash of every prefix that is as long as some call. Linear in the tokens of all
prompts, and blind to what the tokens mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from astuner.types import Call, TokenIds

_Hashes = NDArray[np.uint64]


def length(call: Call) -> int:
    """Tokens of prompt and completion together."""
    return len(call.prompt_ids) + len(call.completion_ids)


def starts_with(ids: TokenIds, call: Call) -> bool:
    """Whether `ids` begins with exactly the call's prompt + completion."""
    middle = len(call.prompt_ids)
    end = middle + len(call.completion_ids)
    return (
        end <= len(ids)
        and np.array_equal(ids[middle:end], call.completion_ids)
        and np.array_equal(ids[:middle], call.prompt_ids)
    )


def find_parents(calls: Sequence[Call]) -> list[int | None]:
    """For each call the index of its parent, if any; `calls` are in order of their start.

    Among calls with equal tokens the recorded parent is taken, else the latest.
    """
    index = _PrefixIndex(calls)
    by_id = {call.call_id: i for i, call in enumerate(calls)}
    previous: dict[tuple[str, str], int] = {}
    parents: list[int | None] = []
    for i, call in enumerate(calls):
        key = (call.agent_name, call.target_tag)
        hints = (by_id.get(call.parent_id or ""), previous.get(key))
        parent = next((h for h in hints if _continues(calls, i, h)), None)
        if parent is None:
            parent = index.longest_prefix(call.prompt_ids)
        index.add(i, parent)
        parents.append(parent)
        previous[key] = i
    return parents


def _continues(calls: Sequence[Call], i: int, hint: int | None) -> bool:
    return hint is not None and hint < i and starts_with(calls[i].prompt_ids, calls[hint])


class _PrefixIndex:
    """Calls by the hash of their tokens.

    hash(ids) = sum of (ids[t] + 1) * weight[t] modulo 2^64 with fixed random weights: a
    call's hash follows from its parent's in the time of the new tokens alone, and the
    hashes of all prefixes of a prompt are one cumulative sum.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        longest = max((len(c.prompt_ids) + len(c.completion_ids) for c in calls), default=0)
        self._calls = calls
        self._weights = np.random.default_rng(0).integers(
            1, 2**64, size=longest, dtype=np.uint64, endpoint=False
        )
        self._is_an_end = np.zeros(longest + 1, np.bool_)
        """Whether some call is exactly so many tokens long."""
        self._hash_of: list[int] = []
        self._by_hash: dict[tuple[int, int], int] = {}

    def add(self, i: int, parent: int | None) -> None:
        call = self._calls[i]
        done = 0 if parent is None else length(self._calls[parent])
        start = 0 if parent is None else self._hash_of[parent]
        prompt, end = len(call.prompt_ids), length(call)
        of_prompt = int(self._terms(call.prompt_ids[done:], done).sum())
        of_completion = int(self._terms(call.completion_ids, prompt).sum())
        total = (start + of_prompt + of_completion) % 2**64
        self._hash_of.append(total)
        self._is_an_end[end] = True
        self._by_hash[end, total] = i

    def longest_prefix(self, ids: TokenIds) -> int | None:
        ends = np.flatnonzero(self._is_an_end[: len(ids) + 1])
        ends = ends[ends > 0][::-1]
        if not len(ends):
            return None
        hashes = np.cumsum(self._terms(ids[: int(ends[0])], 0), dtype=np.uint64)[ends - 1]
        for end, total in zip(ends.tolist(), hashes.tolist(), strict=True):
            found = self._by_hash.get((end, total))
            if found is not None and starts_with(ids, self._calls[found]):
                return found
        return None

    def _terms(self, ids: TokenIds, offset: int) -> _Hashes:
        weights = self._weights[offset : offset + len(ids)]
        return (ids.astype(np.uint64) + np.uint64(1)) * weights
