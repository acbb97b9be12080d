"""From a group that has ended to the rows of Trinity's buffer: one timeline, one row.

Trinity cuts a row into prompt and response, and masks the response. Advantages are
credited here, where the whole group is seen (rule: a group is its episodes, however many
timelines they fell into), and only passed through by `advantage`; how much a row counts in
its batch is said by `batches`. A task always gives at least one row, masked if nothing is
to be learnt of it, since Trinity's trainer waits for what never comes. Pure, and without
Trinity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from astuner.algorithm.advantages import Estimator
from astuner.algorithm.assign import credit
from astuner.types import Episode, Group, Sample

KEY = "astuner"
"""What astuner's own parts tell each other in an Experience's `info`."""


@dataclass(frozen=True)
class Row:
    """One Experience. All lists but `tokens` have one entry per response token."""

    tokens: list[int]
    prompt_length: int
    action_mask: list[bool]
    logprobs: list[float]
    advantages: list[float]
    reward: float
    """The episode's."""
    run: int
    """Which episode of the group."""
    step: int
    """Which of the episode's timelines."""
    told: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """For `batches`: group, episode, rows of the whole group, versions."""

    @property
    def num_trained(self) -> int:
        return sum(self.action_mask)


def group_rows(group: Group, estimator: Estimator, *, kept: bool) -> list[Row]:
    """The rows of the usable episodes; a masked one if the group was not kept, or has none."""
    rows: list[Row] = []
    if kept:
        [samples] = credit([group], estimator)
        for episode in group.usable:
            own = [s for s in samples if s.episode_id == episode.episode_id and s.num_trained]
            rows += [_row(episode, sample, n) for n, sample in enumerate(own)]
    rows = rows or [masked_row(group.born_version)]
    return [_with_group(row, group.group_id, len(rows)) for row in rows]


def no_rows(group_id: str) -> list[Row]:
    """Of a group that was not played."""
    return [_with_group(masked_row(0), group_id, 1)]


def validation_rows(episodes: Sequence[Episode]) -> list[Row]:
    """What Trinity averages its own metrics of; it keeps none of them."""
    version = max((v for e in episodes for v in versions(e)), default=0)
    return [
        masked_row(version, reward=e.reward if e.ok and e.reward is not None else 0.0, run=n)
        for n, e in enumerate(episodes)
    ]


def versions(episode: Episode) -> tuple[int, ...]:
    """Of the weights that sampled each of its calls."""
    return tuple(
        int(call.weight_versions.max()) for call in episode.calls if len(call.weight_versions)
    )


def masked_row(version: int, *, reward: float = 0.0, run: int = 0) -> Row:
    """A row that trains nothing."""
    told = {"episode": "", "oldest": version, "newest": version}
    return Row([0, 0], 1, [False], [0.0], [0.0], reward, run, 0, told)


def _row(episode: Episode, sample: Sample, number: int) -> Row:
    assert sample.advantages is not None
    start, end = _span(sample)
    drawn_by = sample.spans[:, 3]
    return Row(
        tokens=sample.token_ids[:end].tolist(),
        prompt_length=start,
        action_mask=sample.loss_mask[start:end].tolist(),
        logprobs=sample.logprobs[start:end].tolist(),
        advantages=sample.advantages[start:end].tolist(),
        reward=float(episode.reward or 0.0),
        run=episode.repeat_index,
        step=number,
        told={
            "episode": episode.episode_id,
            "oldest": int(drawn_by.min()),
            "newest": int(drawn_by.max()),
        },
    )


def _span(sample: Sample) -> tuple[int, int]:
    """From the first trained token to the last; what follows changes nothing."""
    trained = sample.loss_mask.nonzero()[0]
    return int(trained[0]), int(trained[-1]) + 1


def _with_group(row: Row, group_id: str, rows: int) -> Row:
    told = {**row.told, "group": group_id, "rows": rows}
    return Row(
        row.tokens,
        row.prompt_length,
        row.action_mask,
        row.logprobs,
        row.advantages,
        row.reward,
        row.run,
        row.step,
        told,
    )
