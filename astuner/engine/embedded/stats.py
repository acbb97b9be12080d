"""What an embedded model has done and is doing: for progress displays and watchdogs.

Counters are written on the device thread and read from any; a reader may see
a tick half counted, never a wrong number. Nothing is decided by them.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 10.0
"""The rate is taken over the last so many seconds."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Token counts are since loading."""

    sampled_tokens: int
    prefilled_tokens: int
    """Prompt tokens computed."""
    prefix_hit_tokens: int
    """Prompt tokens whose KV was reused instead."""
    running: int
    waiting: int
    preempted: int
    """Times a running sequence had to make way, for want of KV memory or for a tenant that had
    less than its share of places."""
    cache_tokens: int
    """Tokens in the prefix cache."""
    tokens_per_second: float
    """Sampled, over the last ten seconds."""
    version: int
    """Of the published weights."""
    doing: str
    """What the device thread is at: "idle", "sampling", a verb's name, or "closed"."""
    beat_age: float
    """Seconds since it turned to that."""


@dataclass(slots=True)
class Counters:
    """The scheduler's running totals."""

    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    prefix_hit_tokens: int = 0
    preempted: int = 0
    running: int = 0
    waiting: int = 0
    cache_tokens: int = 0
    pool_tokens: int = 0
    """Tokens of memory taken for running sequences, used or not."""
    _recent: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

    def sampled(self, tokens: int) -> None:
        now = time.monotonic()
        self.sampled_tokens += tokens
        self._recent.append((now, self.sampled_tokens))
        while now - self._recent[0][0] > WINDOW_S:
            self._recent.popleft()

    def snapshot(self, version: int, doing: str, beat: float) -> EngineStats:
        now = time.monotonic()
        recent = [(at, total) for at, total in self._recent.copy() if now - at <= WINDOW_S]
        rate = 0.0
        if recent:
            rate = (self.sampled_tokens - recent[0][1]) / max(now - recent[0][0], 1e-9)
        return EngineStats(
            self.sampled_tokens,
            self.prefilled_tokens,
            self.prefix_hit_tokens,
            self.running,
            self.waiting,
            self.preempted,
            self.cache_tokens,
            rate,
            version,
            doing,
            now - beat,
        )
