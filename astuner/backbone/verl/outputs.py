"""From a finished episode to the rows of verl's batch: one timeline, one row.

verl cuts a row into prompt and response, masks the response, and keeps one score for
each response token (`rm_scores`). Under our own advantage estimator (`plugin`) the scores
are advantages, already credited over the whole group and weighed so that verl's mean over
rows is ours over episodes; under any other, and in validation, the last token's score is
the episode's reward. Pure, and without verl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from astuner.types import Episode, Sample

WEIGHED_BY_EPISODE = "episode-mean"
"""The one aggregation in which a row does not count for itself."""


@dataclass(frozen=True)
class Row:
    """One row. All lists but the prompt's have one entry per response token."""

    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    logprobs: list[float]
    scores: list[float]
    reward: float
    """The episode's."""
    versions: tuple[int, int]
    """Oldest and newest weights that sampled one of its tokens."""
    num_turns: int = 0
    """LLM calls of the episode."""
    seconds: float = 0.0
    """That its calls took together."""
    info: dict[str, float] = field(default_factory=dict[str, float])
    """verl's `reward_extra_info`."""


def advantage_rows(episode: Episode, samples: Sequence[Sample], aggregation: str) -> list[Row]:
    """Rows of the samples (of this episode, with advantages) that have a trained token.

    With "episode-mean" a row's advantages are multiplied by its share of the episode's
    trained tokens: verl's "seq-mean-token-mean" takes the mean over a row's n_r tokens and
    then over rows, so that sum_r (n_r / n) (1 / n_r) sum_t gives each token 1 / n, n being
    the tokens of the episode. Every loss we translate is homogeneous in the advantage.
    """
    trained = [s for s in samples if s.num_trained]
    total = sum(s.num_trained for s in trained)
    rows: list[Row] = []
    for sample in trained:
        weight = sample.num_trained / total if aggregation == WEIGHED_BY_EPISODE else 1.0
        assert sample.advantages is not None
        rows.append(_row(episode, sample, sample.advantages * np.float32(weight)))
    return rows


def reward_rows(episode: Episode) -> list[Row]:
    """Rows with the plain reward at their last token, for verl's own estimators, which
    compare episodes by their last row. Where no token is trained, one row says the reward."""
    samples = [s for s in episode.samples if s.num_trained] or list(episode.samples[-1:])
    rows: list[Row] = []
    for sample in samples:
        scores_T = np.zeros(len(sample.token_ids), np.float32)
        scores_T[-1:] = episode.reward or 0.0
        rows.append(_row(episode, sample, scores_T))
    return rows


def validation_rows(episode: Episode, version: int) -> list[Row]:
    """As `reward_rows`; an episode that failed, or has no calls, gives a masked row of
    nothing, with reward 0."""
    if episode.ok and len(episode.samples):
        return reward_rows(episode)
    return [masked_row(version, info(episode))]


def masked_row(version: int, said: dict[str, float]) -> Row:
    """A row that trains nothing and is worth 0: verl must not find a batch empty."""
    return Row([0], [0], [0], [0.0], [0.0], 0.0, (version, version), info=said)


def info(episode: Episode) -> dict[str, float]:
    """`acc` only where the episode says whether it succeeded: verl then fills in 0 for the
    ones that are missing."""
    said = {"failed": float(not episode.ok)}
    return said if episode.is_success is None else {**said, "acc": float(episode.is_success)}


def _row(episode: Episode, sample: Sample, scores_T: NDArray[np.float32]) -> Row:
    start = _first_of_response(sample)
    versions = sample.spans[:, 3]
    return Row(
        prompt_ids=sample.token_ids[:start].tolist(),
        response_ids=sample.token_ids[start:].tolist(),
        response_mask=sample.loss_mask[start:].astype(int).tolist(),
        logprobs=sample.logprobs[start:].tolist(),
        scores=scores_T[start:].tolist(),
        reward=float(episode.reward or 0.0),
        versions=(int(versions.min()), int(versions.max())) if len(versions) else (0, 0),
        num_turns=len(episode.calls),
        seconds=sum(call.ended_at - call.started_at for call in episode.calls),
        info=info(episode),
    )


def _first_of_response(sample: Sample) -> int:
    """The first trained token, else the last token: both sides of the cut need one."""
    if sample.num_trained:
        return int(sample.loss_mask.argmax())
    return len(sample.token_ids) - 1
