"""The staleness gate: how many groups may be on their way at once.

Arithmetic only. AReaL (Fu et al. 2025, "AReaL: A Large-Scale Asynchronous
Reinforcement Learning System", eq. 3) admits the N-th trajectory only while
floor((N - 1) / B) <= i + eta, with batch size B, i the version being trained and eta
the greatest staleness. Here the same is said with what is still on its way, so that
steps that publish nothing, dropped groups and refills need no correction.
"""

from __future__ import annotations


def may_be_pending(batch_size: int, max_staleness: int, *, training: bool, wanted: int = 0) -> int:
    """How many groups may be in flight or queued at most.

    A group that starts behind P others is consumed after floor(P / B) further batches,
    and each may raise the version by one; a batch that is being trained (consumed, not
    yet published) raises it once more. So P < B * (eta + 1 - training). `wanted` is what
    the trainer waits for at this moment; that much may always be on its way.
    """
    return max(batch_size * (max_staleness + 1 - training), wanted)


def too_stale(oldest_version: int, version: int, max_staleness: int) -> bool:
    """Whether a group's oldest token is too old for the weights about to be trained."""
    return oldest_version < version - max_staleness
