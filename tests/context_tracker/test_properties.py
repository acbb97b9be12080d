"""What must hold for every episode, over random call trees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astuner.context_tracker import build_samples, forest
from astuner.context_tracker.forest import find_parents, length, starts_with
from astuner.types import Call, Sample

from .episodes import episodes
from .plain import plain_samples

quick = settings(max_examples=150, deadline=None)


def build(
    calls: list[Call],
    targets: frozenset[str] | None,
    limit: int | None,
    merge: str,
    max_prompt: int | None = None,
) -> tuple[Sample, ...]:
    return build_samples(
        calls,
        group_id="g",
        task_id="t",
        reward=1.0,
        trainable_targets=targets,
        max_prompt_tokens=max_prompt,
        max_total_tokens=limit,
        merge=merge,
    )


def in_order(calls: list[Call]) -> list[Call]:
    return sorted(calls, key=lambda c: c.started_at)


def trained_of(samples: tuple[Sample, ...]) -> list[tuple[int, int]]:
    """(turn, position) of every trained token of every sample."""
    return [
        (int(s.turns[t]), int(t)) for s in samples for t in np.flatnonzero(s.loss_mask).tolist()
    ]


merges = st.sampled_from(["prefix", "none"])
limits = st.one_of(st.none(), st.integers(0, 12))


@quick
@given(
    episodes(), merges, limits, limits, st.sampled_from([None, frozenset({"x"}), frozenset({"z"})])
)
def test_samples_equal_the_plain_ones(
    calls: list[Call],
    merge: str,
    limit: int | None,
    max_prompt: int | None,
    targets: frozenset[str] | None,
) -> None:
    samples = build(calls, targets, limit, merge, max_prompt)
    plain = plain_samples(calls, targets=targets, max_prompt=max_prompt, merge=merge)
    for s, p in zip(samples, plain, strict=True):
        arrays = (s.token_ids, s.loss_mask, s.logprobs, s.weight_versions, s.turns)
        assert list(zip(*(a.tolist() for a in arrays), strict=True)) == p.kept(limit)
        assert s.masked == p.masked(limit)
        assert (s.agent_name, s.target_tag) == p.agent


@quick
@given(episodes(), merges)
def test_every_sampled_token_is_trained_exactly_once(calls: list[Call], merge: str) -> None:
    trained = trained_of(build(calls, None, None, merge))
    sampled = [
        (turn, len(c.prompt_ids) + t)
        for turn, c in enumerate(in_order(calls))
        for t in range(len(c.completion_ids))
    ]
    assert sorted(trained) == sampled


@quick
@given(episodes(), merges, st.sampled_from([frozenset({"x"}), frozenset({"x", "y"})]))
def test_only_trainable_targets_are_trained(
    calls: list[Call], merge: str, targets: frozenset[str]
) -> None:
    samples = build(calls, targets, None, merge)
    assert sum(s.num_trained for s in samples) == sum(
        len(c.completion_ids) for c in calls if c.target_tag in targets
    )
    assert all(s.num_trained == 0 for s in samples if s.target_tag not in targets)


@quick
@given(episodes(), merges)
def test_every_call_is_a_prefix_of_a_sample_of_its_agent(calls: list[Call], merge: str) -> None:
    samples = build(calls, None, None, merge)
    for c in calls:
        mine = [s for s in samples if (s.agent_name, s.target_tag) == (c.agent_name, c.target_tag)]
        assert any(starts_with(s.token_ids, c) for s in mine)


@quick
@given(episodes(), merges, limits)
def test_what_is_recorded_stays_aligned(calls: list[Call], merge: str, limit: int | None) -> None:
    ordered = in_order(calls)
    for s in build(calls, None, limit, merge):
        assert limit is None or len(s.token_ids) <= limit
        for t, turn in enumerate(s.turns.tolist()):
            if turn < 0:
                assert (s.logprobs[t], s.weight_versions[t], s.loss_mask[t]) == (0, -1, False)
                continue
            c = ordered[turn]
            i = t - len(c.prompt_ids)
            assert s.token_ids[t] == c.completion_ids[i]
            assert s.logprobs[t] == c.logprobs[i]
            assert s.weight_versions[t] == c.weight_versions[i]
            # The context a trained token was sampled in is all there.
            assert s.token_ids[: len(c.prompt_ids)].tolist() == c.prompt_ids.tolist()


@quick
@given(episodes(), merges, limits)
def test_every_token_is_trained_or_masked_for_a_reason(
    calls: list[Call], merge: str, limit: int | None
) -> None:
    whole = build(calls, frozenset({"x"}), None, merge)
    cut = build(calls, frozenset({"x"}), limit, merge)
    for a, b in zip(whole, cut, strict=True):
        assert a.num_trained + sum(a.masked.values()) == len(a.token_ids)
        assert b.num_trained + sum(b.masked.values()) == len(a.token_ids)
        n = len(b.token_ids)
        assert b.loss_mask.tolist() == a.loss_mask[:n].tolist()


@quick
@given(episodes(), st.sampled_from([1, 2, 5, 8192]), st.sampled_from([0, 1, 16]))
def test_a_parent_is_the_longest_call_the_prompt_starts_with(
    calls: list[Call], block: int, ends: int
) -> None:
    """Against the plain quadratic search; without hints, so that the hashes must find it, also
    where prompts are longer than what is hashed at a time and ends are more than are kept."""
    ordered = [replace(c, parent_id=None, agent_name=str(i)) for i, c in enumerate(in_order(calls))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest, "_BLOCK", block)
        patch.setattr(forest, "_ENDS", ends)
        parents = find_parents(ordered)
    for i, parent in enumerate(parents):
        prefixes = [j for j in range(i) if starts_with(ordered[i].prompt_ids, ordered[j])]
        longest = max((length(ordered[j]) for j in prefixes), default=0)
        latest = [j for j in prefixes if length(ordered[j]) == longest and longest][-1:]
        assert ([] if parent is None else [parent]) == latest


@quick
@given(episodes())
def test_a_hint_changes_who_the_parent_is_only_to_a_true_one(calls: list[Call]) -> None:
    ordered = in_order(calls)
    for i, parent in enumerate(find_parents(ordered)):
        prefixes = [j for j in range(i) if starts_with(ordered[i].prompt_ids, ordered[j])]
        assert (
            parent in prefixes
            if parent is not None
            else not any(length(ordered[j]) for j in prefixes)
        )
