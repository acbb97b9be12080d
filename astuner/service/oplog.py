"""The order of one run's operations: a reorder buffer keyed by seq_id.

The SDK numbers the operations of a run from 1 without gaps, and may send them in any
order. They are handed out one at a time in the order of their numbers; a failed one
uses its number up like any other. What they do, and their answers, are not kept here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from astuner.errors import RequestError

T = TypeVar("T")


@dataclass(slots=True)
class OperationLog(Generic[T]):
    """Not thread-safe: all calls come from the server's loop."""

    next_seq: int = 1
    max_waiting: int = 1000
    in_hand: T | None = None
    """What `take` gave and `finish` has not got back."""
    _waiting: dict[int, T] = field(default_factory=dict[int, T])
    _stuck_since: float | None = None

    def add(self, seq: int, operation: T, now: float) -> None:
        """Put it into its place. Raises RequestError: 400 for a number that is out of
        range or used up, 429 when too many wait."""
        if not self.next_seq <= seq < 2**31 or seq in self._waiting or self._is_in_hand(seq):
            raise RequestError(
                f"seq_id {seq} has been used already, or cannot be: the next one is "
                f"{self.next_seq}. Numbers start at 1 and grow by 1 with each request of a run.",
                code="invalid_seq_id",
                param="seq_id",
            )
        if len(self._waiting) >= self.max_waiting and seq != self.next_seq:
            raise RequestError(
                f"{len(self._waiting)} operations of this run are waiting already.",
                status=429,
                code="too_many_operations",
            )
        self._waiting[seq] = operation
        self._note(now)

    def take(self, now: float) -> T | None:
        """The next operation, if it is there and the one before has finished."""
        if self.in_hand is not None or self.next_seq not in self._waiting:
            return None
        self.in_hand = self._waiting.pop(self.next_seq)
        self._note(now)
        return self.in_hand

    def finish(self, operation: T, now: float) -> None:
        """What `take` gave is answered; nothing happens when it had been already."""
        if self.in_hand is operation:
            self.in_hand = None
            self.next_seq += 1
            self._note(now)

    def clear(self) -> list[T]:
        """Give up all that wait, in order."""
        waiting = [self._waiting[seq] for seq in sorted(self._waiting)]
        self._waiting.clear()
        self._stuck_since = None
        return waiting

    def overdue(self, now: float, seconds: float) -> tuple[int, list[T]]:
        """When a number has been missing for longer than `seconds`: that number, and all
        that wait behind it, given up. The numbers up to theirs are then used up."""
        missing = self.next_seq
        if self._stuck_since is None or now - self._stuck_since <= seconds:
            return missing, []
        self.next_seq = max(self._waiting) + 1
        return missing, self.clear()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def all(self) -> list[T]:
        """What is in hand, and what waits."""
        return [*([] if self.in_hand is None else [self.in_hand]), *self._waiting.values()]

    def _is_in_hand(self, seq: int) -> bool:
        return self.in_hand is not None and seq == self.next_seq

    def _note(self, now: float) -> None:
        """Since when nothing can go on because a number is missing."""
        stuck = bool(self._waiting) and self.in_hand is None and self.next_seq not in self._waiting
        if not stuck:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
