"""Attention over a packed row of token tries: each node sees its ancestors and itself.

On CPU the values are the sampler's own (`tree_paths`), so that the trainer's logprobs
are those that were sampled with, and their gradient is `tree_gradient`'s. Elsewhere both
are the fused kernels', in chunks of queries: the keys a chunk can see are the ancestors of
its first token and the chunk itself, so the cost grows with the depth of the trie, not with
the length of the row. The masks are built once for each row and used by every layer. No
cache, no parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from astuner.engine.embedded.tree_gradient import TreeGradient
from astuner.engine.embedded.tree_paths import TreePaths

MAX_CHUNKS = 16
"""Every chunk costs a few kernel launches a layer; long rows get larger chunks."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    queries: slice
    ancestors_A: Tensor
    """Nodes before the chunk that it sees. Its keys are these and then its own nodes."""
    mask: Tensor
    """[n, A + n] in the compute dtype: 0 where the key may be seen, else -inf."""

    def keys(self, of: Tensor) -> Tensor:
        """[K, A + n, D] of [K, T, D]."""
        return torch.cat([of.index_select(1, self.ancestors_A), of[:, self.queries]], 1)


class TreePlan:
    """An AttentionPlan for the nodes of a `packing.Row`: i attends to j iff
    j <= i < ends_T[j]. `positions_T` are their depths."""

    def __init__(
        self,
        ends_T: NDArray[np.int64],
        positions_T: NDArray[np.int64],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._as_sampled: tuple[TreePaths, TreeGradient] | None = None
        self._chunks: list[_Chunk] = []
        total = len(ends_T)
        if device.type == "cpu":
            self._as_sampled = TreePaths(positions_T, dtype), TreeGradient(ends_T, dtype)
        elif (ends_T < total).any():
            size = max(512, -(-total // MAX_CHUNKS))
            self._chunks = [
                _chunk(ends_T, start, min(start + size, total), device, dtype)
                for start in range(0, total, size)
            ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self._as_sampled is not None:
            return _AsSampled.apply(query, key, value, scale, *self._as_sampled)  # pyright: ignore
        if not self._chunks:  # one sequence
            return _fused(query, key, value, None, scale)
        parts = [
            _fused(query[:, c.queries], c.keys(key), c.keys(value), c.mask, scale)
            for c in self._chunks
        ]
        return torch.cat(parts)


def _chunk(
    ends_T: NDArray[np.int64], start: int, stop: int, device: torch.device, dtype: torch.dtype
) -> _Chunk:
    ancestors = np.flatnonzero(ends_T[:start] > start)
    keys = np.concatenate([ancestors, np.arange(start, stop)])
    nodes = np.arange(start, stop)[:, None]
    seen = torch.from_numpy((keys <= nodes) & (nodes < ends_T[keys]))
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return _Chunk(slice(start, stop), torch.from_numpy(ancestors).to(device), mask.to(device))


# ---------------------------------------------------------------- on CPU


class _AsSampled(torch.autograd.Function):
    """The values of `TreePaths` with the gradient of `TreeGradient`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        paths: TreePaths,
        gradient: TreeGradient,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.gradient = scale, gradient
        return paths.attend(query, key, value, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        return *ctx.gradient(query, key, value, ctx.scale, grads[0]), None, None, None


# ---------------------------------------------------------------- elsewhere


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """query [H, n, D] over key and value [K, M, D] under mask [n, M], or causally without one;
    [n, H, D]. Heads are repeated because the kernels that take a mask do not take grouped
    heads."""
    repeats = query.shape[0] // key.shape[0]
    out = F.scaled_dot_product_attention(
        query[None],
        key.repeat_interleave(repeats, 0)[None],
        value.repeat_interleave(repeats, 0)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out[0].transpose(0, 1)
