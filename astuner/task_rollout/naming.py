"""Ids and seeds of groups and episodes: pure functions of their place in the run.

So a resumed run repeats exactly what the interrupted one would have done. Ids are
safe in URLs and file names. No randomness, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a group stands in the run."""

    step: int
    index: int
    """Of the task among the step's; beyond the batch size for groups that refill it."""
    attempt: int = 0
    """Grows when the group was dropped as too stale and its task is run again."""

    @property
    def group_id(self) -> str:
        again = f"-again{self.attempt}" if self.attempt else ""
        return f"s{self.step:05d}-t{self.index:03d}{again}"


def validation_group_id(step: int, index: int) -> str:
    return f"v{step:05d}-t{index:03d}"


def episode_id(group_id: str, repeat: int) -> str:
    return f"{group_id}-e{repeat:02d}"


def derive_seed(*parts: object) -> int:
    """A seed below 2**53 (exact in JSON) that depends on all parts and nothing else."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest()) >> 3
