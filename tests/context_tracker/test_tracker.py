"""Literal ids and masks for every shape of episode."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from astuner.context_tracker import build_samples
from astuner.types import Call, MaskReason, Sample

from .episodes import call

CONTEXT = MaskReason.CONTEXT
ELSEWHERE = MaskReason.TRAINED_ELSEWHERE


def build(
    calls: Sequence[Call],
    *,
    targets: frozenset[str] | None = None,
    max_prompt: int | None = None,
    max_total: int | None = None,
    merge: str = "prefix",
) -> tuple[Sample, ...]:
    return build_samples(
        calls,
        group_id="g",
        task_id="t",
        reward=0.5,
        trainable_targets=targets,
        max_prompt_tokens=max_prompt,
        max_total_tokens=max_total,
        merge=merge,
    )


def mask(sample: Sample) -> str:
    return "".join("x" if m else "." for m in sample.loss_mask)


def test_no_calls_no_samples() -> None:
    assert build([]) == ()


def test_two_turns_are_one_sample() -> None:
    calls = [call(0, [1, 2], [3, 4]), call(1, [1, 2, 3, 4, 5], [6])]
    (sample,) = build(calls)
    assert sample.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert mask(sample) == "..xx.x"
    np.testing.assert_allclose(sample.logprobs, [0, 0, 0, -0.01, 0, -1.0])
    assert sample.weight_versions.tolist() == [-1, -1, 0, 0, -1, 1]
    assert sample.turns.tolist() == [-1, -1, 0, 0, -1, 1]
    assert sample.masked == {CONTEXT: 3}
    assert (sample.reward, sample.group_id, sample.task_id) == (0.5, "g", "t")
    assert (sample.sample_id, sample.episode_id) == ("e/0", "e")


def test_turns_count_calls_in_order_of_their_start() -> None:
    calls = [call(0, [1, 2, 3, 4], [5], started_at=9), call(1, [1, 2], [3], started_at=2)]
    (sample,) = build(calls)
    assert sample.turns.tolist() == [-1, -1, 0, -1, 1]
    assert sample.weight_versions.tolist() == [-1, -1, 1, -1, 0]


def test_a_fork_masks_what_was_trained_before_it() -> None:
    calls = [
        call(0, [1], [2, 3]),
        call(1, [1, 2, 3, 4], [5]),
        call(2, [1, 2, 3, 8], [9]),
    ]
    one, two = build(calls)
    assert (one.token_ids.tolist(), mask(one)) == ([1, 2, 3, 4, 5], ".xx.x")
    assert (two.token_ids.tolist(), mask(two)) == ([1, 2, 3, 8, 9], "....x")
    assert two.masked == {CONTEXT: 2, ELSEWHERE: 2}
    # The shared tokens were sampled: the record says so, though they are not trained here.
    np.testing.assert_allclose(two.logprobs, [0, 0, -0.01, 0, -2.0])
    assert two.turns.tolist() == [-1, 0, 0, -1, 2]


def test_two_later_forks_share_one_reply_that_is_trained_once() -> None:
    calls = [call(0, [1], [2]), *(call(n, [1, 2, 10 + n], [20 + n]) for n in (1, 2, 3))]
    assert [mask(s) for s in build(calls)] == [".x.x", "...x", "...x"]


def test_a_fork_of_a_fork() -> None:
    calls = [
        call(0, [1], [2]),
        call(1, [1, 2, 3], [4]),
        call(2, [1, 2, 5], [6]),
        call(3, [1, 2, 5, 6, 7], [8]),
        call(4, [1, 2, 5, 6, 9], [10]),
    ]
    assert [(s.token_ids.tolist(), mask(s)) for s in build(calls)] == [
        ([1, 2, 3, 4], ".x.x"),
        ([1, 2, 5, 6, 7, 8], "...x.x"),
        ([1, 2, 5, 6, 9, 10], ".....x"),
    ]


def test_parallel_calls_of_one_prompt_are_samples_of_their_own() -> None:
    calls = [call(n, [1, 2], [3 + n], started_at=0) for n in range(3)]
    assert [(s.token_ids.tolist(), mask(s)) for s in build(calls)] == [
        ([1, 2, 3], "..x"),
        ([1, 2, 4], "..x"),
        ([1, 2, 5], "..x"),
    ]


def test_equal_completions_were_each_sampled_and_are_each_trained() -> None:
    assert [mask(s) for s in build([call(0, [1], [2]), call(1, [1], [2])])] == [".x", ".x"]


@pytest.mark.parametrize("parent", [0, 1])
def test_the_recorded_parent_decides_between_equal_replies(parent: int) -> None:
    calls = [call(0, [1], [2]), call(1, [1], [2]), call(2, [1, 2, 3], [4], parent=parent)]
    assert [len(s.token_ids) for s in build(calls)] == ([4, 2] if parent == 0 else [2, 4])


def test_a_wrong_recorded_parent_is_not_believed() -> None:
    calls = [call(0, [1], [2]), call(1, [5], [6]), call(2, [1, 2, 3], [4], parent=1)]
    assert [s.token_ids.tolist() for s in build(calls)] == [[1, 2, 3, 4], [5, 6]]


def test_interleaved_conversations_without_recorded_parents() -> None:
    calls = [
        call(0, [1], [2]),
        call(1, [5], [6]),
        call(2, [1, 2, 3], [4]),
        call(3, [5, 6, 7], [8]),
    ]
    assert [(s.token_ids.tolist(), mask(s)) for s in build(calls)] == [
        ([1, 2, 3, 4], ".x.x"),
        ([5, 6, 7, 8], ".x.x"),
    ]


def test_edited_history_starts_anew() -> None:
    calls = [call(0, [1, 2], [3, 4]), call(1, [1, 2, 3, 9, 5], [6])]
    one, two = build(calls)
    assert (mask(one), mask(two)) == ("..xx", ".....x")
    assert two.masked == {CONTEXT: 5}


def test_a_truncated_reply_is_continued_with_its_synthesised_close_as_context() -> None:
    calls = [call(0, [1], [2, 3], finish="length"), call(1, [1, 2, 3, 99, 4], [5])]
    (sample,) = build(calls)
    assert mask(sample) == ".xx..x"


def test_an_empty_reply_is_continued_too() -> None:
    (sample,) = build([call(0, [1, 2], []), call(1, [1, 2], [3])])
    assert (mask(sample), sample.turns.tolist()) == ("..x", [-1, -1, 1])


def test_agents_and_targets_never_share_a_sample() -> None:
    calls = [
        call(0, [1], [2], agent="planner", target="x"),
        call(1, [1, 2, 3], [4], agent="coder", target="x"),
        call(2, [1, 2, 5], [6], agent="planner", target="x"),
        call(3, [1, 2, 5, 6], [7], agent="planner", target="y"),
    ]
    samples = build(calls)
    assert [(s.agent_name, s.target_tag, mask(s)) for s in samples] == [
        ("planner", "x", ".x.x"),
        ("coder", "x", "...x"),
        ("planner", "y", "....x"),
    ]
    assert samples[1].masked == {CONTEXT: 2, ELSEWHERE: 1}


def test_calls_of_other_targets_are_counted_and_not_trained() -> None:
    calls = [call(0, [1], [2, 3], target="judge"), call(1, [1, 2, 3, 4], [5], target="actor")]
    judge, actor = build(calls, targets=frozenset({"actor"}))
    assert (judge.num_trained, judge.masked) == (0, {CONTEXT: 1, MaskReason.NOT_A_TARGET: 2})
    assert mask(actor) == "....x"
    assert actor.masked == {CONTEXT: 2, MaskReason.NOT_A_TARGET: 2}


def test_no_target_at_all() -> None:
    (sample,) = build([call(0, [1], [2])], targets=frozenset())
    assert sample.num_trained == 0


def test_the_end_is_cut_where_it_is_too_long() -> None:
    calls = [call(0, [1, 2], [3, 4]), call(1, [1, 2, 3, 4, 5], [6, 7, 8])]
    (sample,) = build(calls, max_total=6)
    assert (sample.token_ids.tolist(), mask(sample)) == ([1, 2, 3, 4, 5, 6], "..xx.x")
    assert sample.masked == {CONTEXT: 3, MaskReason.TOO_LONG: 2}
    assert len(sample.logprobs) == len(sample.turns) == len(sample.weight_versions) == 6


def test_a_fork_beyond_the_cut_trains_nothing_and_loses_nothing_else() -> None:
    calls = [call(0, [1, 2], [3]), call(1, [1, 2, 3, 4], [5]), call(2, [1, 2, 3, 6], [7])]
    one, two = build(calls, max_total=4)
    assert (mask(one), mask(two)) == ("..x.", "....")
    assert two.masked == {CONTEXT: 3, ELSEWHERE: 1, MaskReason.TOO_LONG: 1}


def test_nothing_that_follows_an_overlong_opening_prompt_is_trained() -> None:
    calls = [
        call(0, [1, 2, 3], [4]),
        call(1, [1, 2, 3, 4, 5], [6]),
        call(2, [1, 2, 3, 4, 7], [8]),
        call(3, [9, 9, 9, 9], [10]),
    ]
    samples = build(calls, max_prompt=2)
    assert [mask(s) for s in samples] == ["......", "......", "....x"]
    assert samples[1].masked == {CONTEXT: 4, MaskReason.TOO_LONG: 2}
    assert [mask(s) for s in build(calls, max_prompt=3)] == ["...x.x", ".....x", "....x"]


def test_merge_none_makes_every_call_a_sample() -> None:
    calls = [call(0, [1], [2]), call(1, [1, 2, 3], [4])]
    one, two = build(calls, merge="none")
    assert (mask(one), mask(two)) == (".x", "...x")
    assert two.masked == {CONTEXT: 2, ELSEWHERE: 1}
    with pytest.raises(ValueError, match="must be one of prefix, none"):
        build(calls, merge="suffix")


def test_the_first_token_of_all_is_never_trained() -> None:
    (sample,) = build([call(0, [], [1, 2])])
    assert (mask(sample), sample.masked) == (".x", {CONTEXT: 1})
