"""Means over all trained tokens of a call, whatever the micro-batches were.

Sums are kept in float64 and divided once, so that packing does not change a metric.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class TokenMeans:
    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Per-token values [N] of one micro-batch."""
        for name, values in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + values.float().sum().item()
            self._counts[name] = self._counts.get(name, 0) + values.numel()

    def result(self) -> dict[str, float]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}
