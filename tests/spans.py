"""`Sample.spans` from one turn and one weight version for each token."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import numpy as np
from numpy.typing import NDArray


def spans_of(turns_T: Iterable[int], versions_T: Iterable[int]) -> NDArray[np.int32]:
    """-1, -1 where a token was not sampled."""
    rows: list[tuple[int, int, int, int]] = []
    stop = 0
    for (turn, version), run in groupby(zip(turns_T, versions_T, strict=True)):
        start, stop = stop, stop + len(list(run))
        if turn >= 0:
            rows.append((start, stop, int(turn), int(version)))
    return np.array(rows, np.int32).reshape(-1, 4)
