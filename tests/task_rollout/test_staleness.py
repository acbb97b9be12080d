"""The gate's arithmetic, by hand, and against AReaL's formula."""

from __future__ import annotations

from math import floor

import pytest

from astuner.task_rollout.staleness import may_be_pending, too_stale


@pytest.mark.parametrize(
    ("batch", "staleness", "training", "wanted", "expected"),
    [
        (4, 0, False, 4, 4),  # synchronous: one batch while the trainer waits
        (4, 0, True, 0, 0),  # and nothing while it trains
        (4, 1, False, 4, 8),
        (4, 1, True, 0, 4),
        (4, 3, False, 0, 16),
        (4, 3, True, 0, 12),
        (4, 0, False, 6, 6),  # a refill larger than a batch must not wait for ever
    ],
)
def test_literal(batch: int, staleness: int, training: bool, wanted: int, expected: int) -> None:
    assert may_be_pending(batch, staleness, training=training, wanted=wanted) == expected


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_admits_as_areal_does(batch: int, staleness: int) -> None:
    """floor((N - 1) / B) <= i + eta, where N counts all that ever started."""
    for version in range(4):  # so many batches were consumed, trained and published
        for started in range(40):
            areal = floor((started + 1 - 1) / batch) <= version + staleness
            pending = started - version * batch
            if pending >= 0:
                assert (pending < may_be_pending(batch, staleness, training=False)) == areal


def test_too_stale() -> None:
    assert not too_stale(oldest_version=3, version=5, max_staleness=2)
    assert too_stale(oldest_version=2, version=5, max_staleness=2)
    assert too_stale(oldest_version=4, version=5, max_staleness=0)
    assert not too_stale(oldest_version=5, version=5, max_staleness=0)
