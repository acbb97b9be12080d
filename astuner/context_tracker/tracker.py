"""Recorded calls in, token-masked samples out.

The calls of an episode form a forest (see `forest`). A timeline is a path down this
forest: the first child of the same agent and target continues its parent's timeline,
every other child starts a timeline of its own, in which what was sampled before the
fork is context. Pure: no messages, no tensors, no knowledge of templates. Time is
linear in the recorded tokens, whatever the shape of the forest.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from astuner.context_tracker.forest import find_parents, length
from astuner.context_tracker.spans import Spans, find_spans, first_tokens
from astuner.types import Call, MaskReason, Sample, TokenIds

MERGES = ("prefix", "none")


class _Fate(IntEnum):
    """What becomes of a token; all but TRAINED are the MaskReason of the same name."""

    CONTEXT = 0
    TRAINED = 1
    TRAINED_ELSEWHERE = 2
    NOT_A_TARGET = 3
    TOO_LONG = 4


_MASKED = [(MaskReason[fate.name], fate) for fate in _Fate if fate is not _Fate.TRAINED]
_AFTER_A_FORK = np.array(
    [_Fate.TRAINED_ELSEWHERE if fate is _Fate.TRAINED else fate for fate in _Fate], np.int8
)
_Fates = NDArray[np.int8]
"""The fate of each span, shape [S]; what lies between the spans is CONTEXT."""


@dataclass(slots=True, eq=False)
class _Timeline:
    """`turns` are its own calls, in order; `opening` the call at the root of its tree;
    `source` the timeline it forks from, with `shared` tokens in common. Spans, fates and
    logprobs are first its own calls', then with those up to the fork before them."""

    turns: array[int]
    opening: int
    source: _Timeline | None = None
    shared: int = 0
    fate: _Fate = _Fate.TRAINED
    spans: Spans = field(init=False)
    fates: _Fates = field(init=False)
    logprobs: NDArray[np.float32] = field(init=False)


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
    timelines = _timelines(ordered, merge)
    for timeline in timelines:
        tag = ordered[timeline.turns[0]].target_tag
        if trainable_targets is not None and tag not in trainable_targets:
            timeline.fate = _Fate.NOT_A_TARGET
        elif timeline.opening in too_long:
            timeline.fate = _Fate.TOO_LONG
    _give_spans(timelines, ordered)
    samples: list[Sample] = []
    timelines.reverse()
    while timelines:
        timeline = timelines.pop()  # It goes once its sample is made, unless others fork from it.
        last = ordered[timeline.turns[-1]]
        whole = length(last)
        keep = whole if max_total_tokens is None else min(whole, max_total_tokens)
        if timeline.source is not None:
            _put_before(timeline, timeline.source)
        masked = _count_masked(timeline, whole, keep)
        loss_mask, timeline.logprobs = _mask_and_logprobs(timeline, ordered, keep)
        samples.append(
            Sample(
                sample_id=f"{last.episode_id}/{len(samples)}",
                episode_id=last.episode_id,
                group_id=group_id,
                task_id=task_id,
                agent_name=last.agent_name,
                target_tag=last.target_tag,
                token_ids=_token_ids(last, keep),
                loss_mask=loss_mask,
                logprobs=timeline.logprobs,
                spans=first_tokens(timeline.spans, keep),
                reward=reward,
                masked=masked,
            )
        )
    return tuple(samples)


def _token_ids(call: Call, keep: int) -> TokenIds:
    prompt = call.prompt_ids[:keep]
    return np.concatenate([prompt, call.completion_ids[: keep - len(prompt)]])


def _timelines(calls: Sequence[Call], merge: str) -> list[_Timeline]:
    """Paths down the forest, in order of their first call."""
    timelines: list[_Timeline] = []
    home: list[_Timeline] = []
    for i, parent in enumerate(find_parents(calls)):
        if parent is None:
            timeline = _Timeline(array("i"), opening=i)
        elif merge == "prefix" and _may_continue(home[parent], parent, calls, i):
            timeline = home[parent]
        else:
            source = home[parent]
            timeline = _Timeline(array("i"), source.opening, source, length(calls[parent]))
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


def _give_spans(timelines: Sequence[_Timeline], calls: Sequence[Call]) -> None:
    """Each timeline gets the spans of its own calls, and what becomes of them."""
    order = np.fromiter((turn for t in timelines for turn in t.turns), np.int32, len(calls))
    spans, counts = find_spans(calls, order)
    firsts = np.cumsum([0, *(len(t.turns) for t in timelines)])
    edges = np.concatenate([[0], np.cumsum(counts)])[firsts]
    fates = np.repeat(np.array([t.fate for t in timelines], np.int8), np.diff(edges))
    # Nothing predicts the very first token, so it cannot be trained.
    fates[(spans[:, 0] == 0) & (fates == _Fate.TRAINED)] = _Fate.CONTEXT
    for timeline, (begin, end) in zip(timelines, pairwise(edges.tolist()), strict=True):
        timeline.spans, timeline.fates = spans[begin:end], fates[begin:end]


def _put_before(timeline: _Timeline, source: _Timeline) -> None:
    """What was sampled up to the fork."""
    shared = int(np.searchsorted(source.spans[:, 1], timeline.shared, side="right"))
    fates = _AFTER_A_FORK[source.fates[:shared]]
    timeline.spans = np.concatenate([source.spans[:shared], timeline.spans])
    timeline.fates = np.concatenate([fates, timeline.fates])


def _mask_and_logprobs(
    timeline: _Timeline, calls: Sequence[Call], keep: int
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Of the first `keep` tokens."""
    mask, logprobs = np.zeros(keep, np.bool_), np.zeros(keep, np.float32)
    if timeline.source is not None:
        shared = slice(min(timeline.shared, keep))
        logprobs[shared] = timeline.source.logprobs[shared]
    for turn in timeline.turns:
        start, stop = len(calls[turn].prompt_ids), length(calls[turn])
        mask[start:stop] = timeline.fate is _Fate.TRAINED
        logprobs[start:stop] = calls[turn].logprobs[: max(0, keep - start)]
    mask[:1] = False
    return mask, logprobs


def _count_masked(timeline: _Timeline, whole: int, keep: int) -> dict[MaskReason, int]:
    spans = timeline.spans if keep == whole else timeline.spans.clip(max=keep)
    counts = np.bincount(timeline.fates, spans[:, 1] - spans[:, 0], len(_Fate)).tolist()
    counts[_Fate.CONTEXT] += keep - sum(counts)
    counts[_Fate.TOO_LONG] += whole - keep
    return {reason: int(counts[fate]) for reason, fate in _MASKED if counts[fate]}
