"""The weights of a batch's rows; by hand."""

from __future__ import annotations

import numpy as np
import pytest

from astuner.backbone.trinity.weighing import weights_of

EPISODES = ["g0/e0", "g0/e0", "g0/e1", "g1/e0"]
MASKS = [np.array(m, bool) for m in ([1, 0, 1], [1, 1], [1], [0])]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # two episodes with trained tokens: 1 / (2 * 4) for the first, 1 / (2 * 1) for the second
        ("episode-mean", [[0.125, 0, 0.125], [0.125, 0.125], [0.5], [0]]),
        ("token-mean", [[0.2, 0, 0.2], [0.2, 0.2], [0.2], [0]]),
        ("constant", [[0.05, 0, 0.05], [0.05, 0.05], [0.05], [0]]),  # 1 / (2 * 10)
    ],
)
def test_an_episode_counts_once(aggregation: str, expected: list[list[float]]) -> None:
    weights = weights_of(EPISODES, MASKS, aggregation, 10)
    for got, due in zip(weights, expected, strict=True):
        assert got.tolist() == pytest.approx(due)
