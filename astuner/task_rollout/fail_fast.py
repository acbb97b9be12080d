"""Stops a run in which nothing works: nobody wants a thousand identical failures.

Watches groups as they end. When so many in a row failed with all their episodes,
the most frequent kind of failure is raised once, with the user's traceback. A group
in which one episode ended well starts the count anew. It neither retries nor drops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from astuner.errors import AstunerError, EngineError, UserCodeError
from astuner.types import Episode, Failure, FailureKind

INFRASTRUCTURE = frozenset({FailureKind.ENGINE, FailureKind.ENVIRONMENT})
PATIENCE = 4
"""Once something has worked, this many times more groups in a row may fail."""


class FailFast:
    """Counts groups that failed entirely; `limit` in a row end a run that never worked."""

    def __init__(self, limit: int) -> None:
        self._limit = max(1, limit)
        self._worked = False
        self._groups = 0
        self._failures: list[Failure] = []

    def observe(self, episodes: Sequence[Episode]) -> None:
        """Take note of one group that has ended.

        Raises UserCodeError, or EngineError where most failures are infrastructure's.
        """
        if any(episode.ok for episode in episodes):
            self._worked, self._groups, self._failures = True, 0, []
            return
        self._groups += 1
        self._failures += [e.failure for e in episodes if e.failure is not None]
        if self._groups >= self._limit * (PATIENCE if self._worked else 1):
            raise self._verdict()

    def _verdict(self) -> AstunerError:
        kinds = Counter(failure.kind for failure in self._failures).most_common()
        worst = kinds[0][0]
        shown = next(failure for failure in self._failures if failure.kind is worst)
        counts = ", ".join(f"{number} x {kind}" for kind, number in kinds)
        message = (
            f"All {len(self._failures)} episodes of {self._groups} tasks in a row failed "
            f"({counts}), so the run was stopped. The first failure of kind {worst}:\n"
            f"{shown.message}\n{shown.traceback}"
        ).rstrip()
        return (EngineError if worst in INFRASTRUCTURE else UserCodeError)(message)
