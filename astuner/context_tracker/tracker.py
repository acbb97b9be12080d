"""Recorded calls in, token-masked samples out.

The calls of an episode form a forest (see `forest`). A timeline is a path down this
forest: the first child of the same agent and target continues its parent's timeline,
every other child starts a timeline of its own, in which what was sampled before the
fork is context. Pure: no messages, no tensors, no knowledge of templates. Time is
linear in the recorded tokens, whatever the shape of the forest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astuner.context_tracker.forest import find_parents, length
from astuner.types import Call, MaskReason, Sample

MERGES = ("prefix", "none")


class _Fate(IntEnum):
    """What becomes of a token; all but TRAINED are the MaskReason of the same name."""

    CONTEXT = 0
    TRAINED = 1
    TRAINED_ELSEWHERE = 2
    NOT_A_TARGET = 3
    TOO_LONG = 4


_AFTER_A_FORK = np.array(
    [_Fate.TRAINED_ELSEWHERE if fate is _Fate.TRAINED else fate for fate in _Fate], np.int8
)


@dataclass(slots=True, eq=False)
class _Timeline:
    """`turns` are its own calls, in order; `opening` the call at the root of its tree;
    `source` the timeline it forks from, with `shared` tokens in common."""

    turns: list[int]
    opening: int
    source: _Timeline | None = None
    shared: int = 0
    notes: _Notes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Notes:
    """What is known of each token of a timeline; every array has shape [T]."""

    fates: NDArray[np.int8]
    logprobs: NDArray[np.float32]
    weight_versions: NDArray[np.int32]
    turns: NDArray[np.int32]


def build_samples(
    calls: Sequence[Call],
    *,
    group_id: str,
    task_id: str,
    reward: float,
    trainable_targets: frozenset[str] | None,
    max_prompt_tokens: int | None,
    max_total_tokens: int | None,
    merge: str = "prefix",
) -> tuple[Sample, ...]:
    """One sample for each timeline of one episode, in order of their first call.

    Every sampled token is trained in exactly one sample, unless its call's target is not
    in `trainable_targets` (None: all are) or it is too long. A timeline that trains
    nothing is returned all the same, so that its tokens are counted. `Sample.masked` and
    `num_trained` add up to the number of tokens of the timeline.

    `max_total_tokens` cuts off a timeline's end, never its start, so that every trained
    token keeps its whole context; what is cut counts as TOO_LONG. `max_prompt_tokens`
    bounds the opening prompt of each agent: where that is longer, nothing that follows
    it is trained. `merge="none"` makes every call a sample of its own.

    Raises ValueError for an unknown merge.
    """
    if merge not in MERGES:
        raise ValueError(f"merge is {merge!r}; it must be one of {', '.join(MERGES)}")
    ordered = sorted(calls, key=lambda call: call.started_at)
    too_long = _openings_longer_than(max_prompt_tokens, ordered)
    samples: list[Sample] = []
    for n, timeline in enumerate(_timelines(ordered, merge)):
        last = ordered[timeline.turns[-1]]
        fate = _Fate.TRAINED
        if trainable_targets is not None and last.target_tag not in trainable_targets:
            fate = _Fate.NOT_A_TARGET
        elif timeline.opening in too_long:
            fate = _Fate.TOO_LONG
        timeline.notes = _annotate(timeline, ordered, fate)
        sample = _sample(f"{last.episode_id}/{n}", last, timeline.notes, max_total_tokens)
        samples.append(replace(sample, group_id=group_id, task_id=task_id, reward=reward))
    return tuple(samples)


def _sample(sample_id: str, last: Call, notes: _Notes, limit: int | None) -> Sample:
    """A timeline that ends with the call `last`, cut to `limit` tokens."""
    ids = np.concatenate([last.prompt_ids, last.completion_ids])
    keep = len(ids) if limit is None else min(len(ids), limit)
    return Sample(
        sample_id=sample_id,
        episode_id=last.episode_id,
        group_id="",
        task_id="",
        agent_name=last.agent_name,
        target_tag=last.target_tag,
        token_ids=_cut(ids, keep),
        loss_mask=notes.fates[:keep] == _Fate.TRAINED,
        logprobs=_cut(notes.logprobs, keep),
        weight_versions=_cut(notes.weight_versions, keep),
        turns=_cut(notes.turns, keep),
        masked=_count_masked(notes.fates, keep),
    )


def _cut(values: NDArray[Any], keep: int) -> NDArray[Any]:
    """A copy where something goes, so that the long original can be freed."""
    return values if keep == len(values) else values[:keep].copy()


def _timelines(calls: Sequence[Call], merge: str) -> list[_Timeline]:
    """Paths down the forest, in order of their first call."""
    timelines: list[_Timeline] = []
    home: list[_Timeline] = []
    for i, parent in enumerate(find_parents(calls)):
        if parent is None:
            timeline = _Timeline([], opening=i)
        elif merge == "prefix" and _may_continue(home[parent], parent, calls, i):
            timeline = home[parent]
        else:
            source = home[parent]
            timeline = _Timeline([], source.opening, source, length(calls[parent]))
        if not timeline.turns:
            timelines.append(timeline)
        timeline.turns.append(i)
        home.append(timeline)
    return timelines


def _may_continue(timeline: _Timeline, parent: int, calls: Sequence[Call], i: int) -> bool:
    """Only from a timeline's end, and only by the same agent and target."""
    a, b = calls[parent], calls[i]
    same = a.agent_name == b.agent_name and a.target_tag == b.target_tag
    return same and timeline.turns[-1] == parent


def _openings_longer_than(limit: int | None, calls: Sequence[Call]) -> set[int]:
    """Each agent's first call, where its prompt is longer than `limit` tokens."""
    first: dict[tuple[str, str], int] = {}
    for i, call in enumerate(calls):
        first.setdefault((call.agent_name, call.target_tag), i)
    return {i for i in first.values() if limit is not None and len(calls[i].prompt_ids) > limit}


def _annotate(timeline: _Timeline, calls: Sequence[Call], fate: _Fate) -> _Notes:
    """Copy what is known up to the fork, then write down the timeline's own calls."""
    last = calls[timeline.turns[-1]]
    size = length(last)
    notes = _Notes(
        np.zeros(size, np.int8),
        np.zeros(size, np.float32),
        np.full(size, -1, np.int32),
        np.full(size, -1, np.int32),
    )
    if timeline.source is not None and timeline.source.notes is not None:
        before, shared = timeline.source.notes, slice(timeline.shared)
        notes.fates[shared] = _AFTER_A_FORK[before.fates[shared]]
        notes.logprobs[shared] = before.logprobs[shared]
        notes.weight_versions[shared] = before.weight_versions[shared]
        notes.turns[shared] = before.turns[shared]
    for turn in timeline.turns:
        call = calls[turn]
        own = slice(len(call.prompt_ids), length(call))
        notes.fates[own] = fate
        notes.logprobs[own] = call.logprobs
        notes.weight_versions[own] = call.weight_versions
        notes.turns[own] = turn
    # Nothing predicts the very first token, so it cannot be trained.
    if size and notes.fates[0] == _Fate.TRAINED:
        notes.fates[0] = _Fate.CONTEXT
    return notes


def _count_masked(fates: NDArray[np.int8], keep: int) -> dict[MaskReason, int]:
    counts = np.bincount(fates[:keep], minlength=len(_Fate))
    counts[_Fate.TOO_LONG] += len(fates) - keep
    masked = {
        MaskReason[fate.name]: int(counts[fate]) for fate in _Fate if fate is not _Fate.TRAINED
    }
    return {reason: count for reason, count in masked.items() if count}
