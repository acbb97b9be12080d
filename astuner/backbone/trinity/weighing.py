"""The weights of a batch's tokens, of its rows alone: `algorithm.aggregation` without Samples.

Pure, and without Trinity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from astuner.algorithm import AGGREGATIONS, resolve
from astuner.types import Sample


def weights_of(
    episodes: Sequence[str],
    masks: Sequence[NDArray[np.bool_]],
    aggregation: str,
    max_response_length: int,
) -> list[NDArray[np.float32]]:
    """For each row, of this episode and with this mask [T], its tokens' weights [T]."""
    samples = [_bare(e, m) for e, m in zip(episodes, masks, strict=True)]
    return resolve(AGGREGATIONS, aggregation, "aggregation")(samples, max_response_length)


def _bare(episode: str, mask: NDArray[np.bool_]) -> Sample:
    """Only what an aggregation reads."""
    zeros = np.zeros(len(mask), np.int32)
    return Sample(
        sample_id="",
        episode_id=episode,
        group_id="",
        task_id="",
        agent_name="",
        target_tag="",
        token_ids=zeros,
        loss_mask=mask,
        logprobs=zeros.astype(np.float32),
    )
