"""Token tries written out by hand, and the promises of packing over random samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from astuner.engine.embedded.packing import Row, pack
from astuner.engine.embedded.tree_paths import TreePaths
from astuner.engine.embedded.tree_plan import TreePlan, _fused
from astuner.types import Sample

from .tiny_training import sample


def test_a_group_shares_its_prompt_and_identical_completions() -> None:
    prompt = ([5, 6, 7], False)
    samples = [
        sample("a", prompt, ([9, 8, 2], True)),
        sample("b", prompt, ([4, 2], True)),
        sample("c", prompt, ([9, 8, 2], True)),
        sample("d", prompt, ([9, 3], True)),
    ]
    (row,) = pack(samples, 100)
    # Sorted: b [5 6 7 4], d [5 6 7 9], a and c [5 6 7 9 8]; last tokens are targets only.
    assert row.ids_T.tolist() == [5, 6, 7, 4, 9, 8]
    assert row.positions_T.tolist() == [0, 1, 2, 3, 3, 4]
    assert row.ends_T.tolist() == [6, 6, 6, 4, 6, 6]
    assert row.samples.tolist() == [1, 3, 0, 2]
    assert row.sources_R.tolist() == [2, 3, 4, 5]
    assert row.source_N.tolist() == [0, 1, 0, 2, 0, 2, 3, 0, 2, 3]
    assert row.targets_N.tolist() == [4, 2, 9, 3, 9, 8, 2, 9, 8, 2]
    assert row.segments_N.tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_forked_episode_shares_its_history() -> None:
    history = [([5, 6], False), ([7, 8], True), ([9], False)]
    left = sample("left", *history, ([10, 11], True))
    right = sample("right", ([5, 6, 7, 8, 9], False), ([12], True))
    (row,) = pack([right, left], 100)
    assert row.ids_T.tolist() == [5, 6, 7, 8, 9, 10]
    assert row.ends_T.tolist() == [6, 6, 6, 6, 6, 6]
    assert row.samples.tolist() == [0, 1]
    assert row.targets_N.tolist() == [12, 7, 8, 10, 11]
    assert row.sources_R[row.source_N].tolist() == [4, 1, 2, 4, 5]


def test_two_prompts_are_two_trees_and_unrelated_tokens_do_not_meet() -> None:
    (row,) = pack(
        [sample("a", ([3, 4], False), ([5], True)), sample("b", ([6], False), ([7, 8], True))], 10
    )
    assert row.ids_T.tolist() == [3, 4, 6, 7]
    assert row.positions_T.tolist() == [0, 1, 0, 1]
    assert row.ends_T.tolist() == [2, 2, 4, 4]


def test_a_trie_beyond_the_budget_is_split_and_repeats_the_prefix() -> None:
    samples = [sample(str(i), ([5, 6, 7], False), ([10 + i, 3, 4], True)) for i in range(3)]
    rows = pack(samples, 7)  # 3 + 2 + 2 nodes, then 3 + 2
    assert [r.ids_T.tolist() for r in rows] == [[5, 6, 7, 10, 3, 11, 3], [5, 6, 7, 12, 3]]
    assert [r.samples.tolist() for r in rows] == [[0, 1], [2]]


def test_a_sample_longer_than_the_budget_has_a_row_of_its_own() -> None:
    long = sample("long", ([4] * 20, False), ([5], True))
    short = sample("short", ([3], False), ([5], True))
    assert [r.samples.tolist() for r in pack([long, short], 8)] == [[1], [0]]


def test_nothing_trained_is_left_out() -> None:
    assert pack([sample("a", ([3, 4], False))], 10) == []


def test_tokens_after_the_last_trained_one_are_not_computed() -> None:
    (row,) = pack([sample("a", ([3], False), ([4, 5], True), ([6, 7, 8], False))], 10)
    assert row.ids_T.tolist() == [3, 4]


def test_ids_beyond_a_byte_keep_their_order() -> None:
    samples = [sample(str(i), ([i], False), ([5], True)) for i in (70000, 255, 256, 3)]
    (row,) = pack(samples, 10)
    assert row.ids_T.tolist() == [3, 255, 256, 70000]


@st.composite
def sample_lists(draw: st.DrawFn) -> list[Sample]:
    """Few distinct tokens, so that prefixes are often shared."""
    lists = draw(st.lists(st.lists(st.integers(3, 5), min_size=2, max_size=8), max_size=8))
    masks = [draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))) for x in lists]
    return [
        sample(str(i), *(([t], m and k > 0) for k, (t, m) in enumerate(zip(x, mask, strict=True))))
        for i, (x, mask) in enumerate(zip(lists, masks, strict=True))
    ]


def seen_by(row: Row, node: int) -> list[int]:
    return [j for j in range(node + 1) if row.ends_T[j] > node]


@given(sample_lists(), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_every_trained_token_sees_exactly_its_prefix(samples: list[Sample], budget: int) -> None:
    rows = pack(samples, budget)
    packed_samples = [int(i) for row in rows for i in row.samples]
    assert sorted(packed_samples) == [i for i, s in enumerate(samples) if s.num_trained]
    for row in rows:
        assert len(row.ids_T) <= budget or len(row.samples) == 1
        for segment, index in enumerate(row.samples):
            item, chosen = samples[index], row.segments_N == segment
            trained = np.flatnonzero(item.loss_mask)
            assert row.targets_N[chosen].tolist() == item.token_ids[trained].tolist()
            for node, t in zip(row.sources_R[row.source_N[chosen]], trained, strict=True):
                path = seen_by(row, int(node))
                assert row.ids_T[path].tolist() == item.token_ids[:t].tolist()
                assert row.positions_T[path].tolist() == list(range(t))


def test_attention_in_chunks_is_attention_under_the_whole_mask() -> None:
    """300 nodes are five chunks on CPU, each with keys of its own."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, 90, 40).tolist()
    samples = [
        sample(str(i), (prompt, False), (rng.integers(3, 90, 30).tolist(), True)) for i in range(9)
    ]
    (row,) = pack(samples, 4096)
    total = len(row.ids_T)
    assert total == 40 + 9 * 29
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(n, total, 8, generator=generator, requires_grad=True) for n in (4, 2, 2)
    )
    cpu = torch.device("cpu")
    plan = TreePlan(row.ends_T, row.positions_T, device=cpu, dtype=torch.float32)
    out = plan.attend(0, query, key, value, 0.3)
    nodes = np.arange(total)
    allowed = (nodes <= nodes[:, None]) & (nodes[:, None] < row.ends_T)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 0), value.repeat_interleave(2, 0),
        attn_mask=torch.from_numpy(allowed), scale=0.3,
    ).transpose(0, 1)  # fmt: skip
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    inputs = (query, key, value)
    seed = torch.randn(out.shape, generator=generator)
    for mine, theirs in zip(
        torch.autograd.grad(out, inputs, seed),
        torch.autograd.grad(expected, inputs, seed),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_both_kernels_agree(masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(n, 6, 8, generator=generator) for n in (4, 2, 2))
    mask = torch.full((6, 6), float("-inf")).triu(1)
    torch.testing.assert_close(
        _fused(query, key, value, mask if masked else None, 0.3),
        TreePaths(np.arange(6), query.dtype).attend(query, key, value, 0.3),
        atol=1e-5,
        rtol=1e-5,
    )
