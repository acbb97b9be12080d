"""What the calls of an episode sampled, as rows of `Sample.spans`.

A row is a run of tokens of one call that were drawn by the same weights. Made for all
calls at once: an episode may have ten thousand, of a few tokens each. Knows nothing of
timelines, nor of what is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from astuner.types import Call

Spans = NDArray[np.int32]
"""(start, stop, turn, weight version) in each row, shape [S, 4]."""


def find_spans(calls: Sequence[Call], order: NDArray[np.int32]) -> tuple[Spans, NDArray[np.int64]]:
    """The rows of `calls` in the given order of their indices, and how many of them each call
    has, shape [calls].

    A token that nothing precedes has a row of its own, since it cannot be trained.
    """
    drawn = [calls[i].weight_versions for i in order]
    prompts = np.fromiter((len(calls[i].prompt_ids) for i in order), np.int64, len(order))
    sizes = np.fromiter(map(len, drawn), np.int64, len(order))
    versions = np.concatenate([np.zeros(0, np.int32), *drawn])
    ends = np.cumsum(sizes)
    begins = ends - sizes
    is_first = np.ones(len(versions), np.bool_)
    is_first[1:] = versions[1:] != versions[:-1]
    is_first[begins[sizes > 0]] = True
    is_first[begins[(prompts == 0) & (sizes > 1)] + 1] = True
    places = np.flatnonzero(is_first)
    owners = np.searchsorted(ends, places, side="right")
    spans = np.empty((len(places), 4), np.int32)
    spans[:, 0] = prompts[owners] + places - begins[owners]
    spans[:, 1] = spans[:, 0] + np.diff(places, append=len(versions))
    spans[:, 2] = order[owners]
    spans[:, 3] = versions[places]
    return spans, np.bincount(owners, minlength=len(order))


def first_tokens(spans: Spans, keep: int) -> Spans:
    """What of the rows lies within the first `keep` tokens."""
    if not len(spans) or spans[-1, 1] <= keep:
        return spans
    kept = spans[spans[:, 0] < keep]
    kept[:, 1] = kept[:, 1].clip(max=keep)
    return kept
