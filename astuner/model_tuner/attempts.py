"""Which requests are one call asked again, because its answer was lost on the way.

A client that times out and asks again wants one call, not two. While the first attempt
is in the air its connection closes, it is cancelled and forgotten, and the next attempt
samples anew. Where it had been answered and recorded, the next attempt gets that same
answer and no second call is recorded. Asked again is: the same `Idempotency-Key`, or the
same body with the SDKs' `x-stainless-retry-count` above 0. Without either, equal requests
are calls of their own (sampling one prompt many times is common). Keeps no calls.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from astuner.errors import RequestError

REMEMBERED = 256
"""The latest requests of an agent that can be answered again."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request says about itself."""

    body: bytes
    """Digest of its path and body."""
    key: str | None = None
    """Its Idempotency-Key."""
    again: bool = False
    """The client says that it asked before."""


@dataclass(slots=True)
class Attempt:
    """One request being answered."""

    answered: Any = None
    """What an earlier attempt was answered with, in the endpoint's own form; the endpoint
    sets it when it has an answer."""


@dataclass(slots=True)
class _Known:
    body: bytes
    in_air: int = 0
    failed: int = 0
    """Attempts that ended without an answer and were not repeated yet."""
    answered: Any = None


class Attempts:
    """The latest requests of one agent. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes | str, _Known] = OrderedDict()

    @contextmanager
    def take(self, claim: Claim) -> Generator[Attempt]:
        """The time in which the request is answered.

        Raises RequestError for an Idempotency-Key that is in the air (409, worth a retry)
        or was used for another request (400)."""
        with self._lock:
            known = self._remember(claim)
            attempt = Attempt(self._earlier(known, claim))
            known.in_air += 1
        try:
            yield attempt
        finally:
            with self._lock:
                known.in_air -= 1
                known.failed += attempt.answered is None
                known.answered = attempt.answered or known.answered

    def _remember(self, claim: Claim) -> _Known:
        name = claim.body if claim.key is None else claim.key
        known = self._known.setdefault(name, _Known(claim.body))
        self._known.move_to_end(name)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return known

    @staticmethod
    def _earlier(known: _Known, claim: Claim) -> Any:
        """The answer that this request should have got already, if any."""
        if claim.key is not None:
            _check(known, claim)
            return known.answered
        if not claim.again:
            return None
        if known.failed:  # that is the one asked again
            known.failed -= 1
            return None
        return known.answered


def _check(known: _Known, claim: Claim) -> None:
    if known.body != claim.body:
        raise RequestError(
            f"Idempotency-Key {claim.key!r} was used for another request. Use a new key for "
            "each request, and the same one only to repeat it unchanged.",
            code="idempotency_key_reused",
        )
    if known.in_air and known.answered is None:
        raise RequestError(
            f"The request with Idempotency-Key {claim.key!r} is still being answered.",
            status=409,
            code="idempotency_key_in_use",
        )
