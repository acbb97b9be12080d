"""Gradients in batches of chunks are those of plain attention under the whole mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from astuner.engine.embedded import tree_gradient
from astuner.engine.embedded.tree_gradient import TreeGradient

DIM = 4


@st.composite
def tries(draw: st.DrawFn) -> NDArray[np.int64]:
    """`ends_T` of a forest of up to 40 nodes in depth-first order."""
    depths = [0]
    for _ in range(draw(st.integers(0, 39))):
        depths.append(draw(st.integers(max(0, depths[-1] - 3), depths[-1] + 1)))
    ends = [
        next((j for j in range(i + 1, len(depths)) if depths[j] <= depth), len(depths))
        for i, depth in enumerate(depths)
    ]
    return np.array(ends, np.int64)


@pytest.mark.parametrize(("chunk", "scores"), [(1, 1), (8, 1), (8, 300), (64, 1 << 19)])
@given(ends_T=tries(), heads=st.sampled_from([(1, 1), (6, 2), (3, 3)]))
@settings(max_examples=20, deadline=None)
def test_it_is_that_of_plain_attention(
    chunk: int, scores: int, ends_T: NDArray[np.int64], heads: tuple[int, int]
) -> None:
    total, (query_heads, kv_heads) = len(ends_T), heads
    generator = torch.Generator().manual_seed(total)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    query, key, value = (values(h, total, DIM) for h in (query_heads, kv_heads, kv_heads))
    seed = values(total, query_heads, DIM)
    nodes = np.arange(total)
    seen = torch.from_numpy((nodes <= nodes[:, None]) & (nodes[:, None] < ends_T))

    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    keys, values_ = (x.repeat_interleave(query_heads // kv_heads, 0) for x in leaves[1:])
    weights = (leaves[0] @ keys.transpose(1, 2) * 0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    out = (weights @ values_).transpose(0, 1)
    plain = torch.autograd.grad(out, leaves, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_gradient, "CHUNK", chunk)
        patch.setattr(tree_gradient, "SCORES", scores)
        mine = TreeGradient(ends_T, torch.float32)(query, key, value, 0.5, seed)
    for ours, theirs in zip(mine, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_bfloat16_it_is_that_of_float32_but_for_rounding() -> None:
    ends_T = np.array([9, 9, 5, 5, 5, 9, 9, 8, 9], np.int64)
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 9, DIM), (2, 9, DIM), (2, 9, DIM), (9, 6, DIM)
    coarse = [torch.randn(s, generator=generator).bfloat16() for s in shapes]
    query, key, value, seed = (x.float() for x in coarse)
    exact = TreeGradient(ends_T, torch.float32)(query, key, value, 0.5, seed)
    query, key, value, seed = coarse
    mine = TreeGradient(ends_T, torch.bfloat16)(query, key, value, 0.5, seed)
    for ours, theirs in zip(mine, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 0.02
