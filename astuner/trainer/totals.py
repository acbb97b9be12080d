"""What a run has done so far, over all its steps: the figures of `summary.json`.

A `Totals` is added to after each step and saved in each checkpoint, so that a
resumed run counts from where it was. Validation is not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Totals:
    tokens_sampled: int = 0
    """By the policy, in training episodes, the failed ones included."""
    tokens_trained: int = 0
    tokens_masked_by_reason: Mapping[str, int] = field(default_factory=dict)
    """Tokens of training episodes that were not trained. A reason is one of
    `types.MaskReason`, or why a whole group or episode was left out."""
    episodes: int = 0
    episodes_failed: int = 0
    steps_skipped: int = 0
    """Steps in which there was nothing to learn."""
    train_seconds: float = 0.0
    """Wall time of the steps: rollout, training, publishing and checkpoints."""

    def __add__(self, other: Totals) -> Totals:
        masked = Counter(self.tokens_masked_by_reason)
        masked.update(other.tokens_masked_by_reason)
        return Totals(
            tokens_sampled=self.tokens_sampled + other.tokens_sampled,
            tokens_trained=self.tokens_trained + other.tokens_trained,
            tokens_masked_by_reason=dict(masked),
            episodes=self.episodes + other.episodes,
            episodes_failed=self.episodes_failed + other.episodes_failed,
            steps_skipped=self.steps_skipped + other.steps_skipped,
            train_seconds=self.train_seconds + other.train_seconds,
        )
