"""Attention over a packed row of token tries: each node sees its ancestors and itself.

On CPU the values are the sampler's own (`tree_paths`), so that the trainer's logprobs
are those that were sampled with. Their gradient, and elsewhere the values too, are
computed in chunks of queries: the keys a chunk can see are the ancestors of its first
token and the chunk itself, so the cost grows with the depth of the trie, not with the
length of the row. The masks are built once for each row and used by every layer. No
cache, no parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

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

    def add_to(self, into: Tensor, part: Tensor) -> None:
        """The reverse: add [K, A + n, D] to [K, T, D]."""
        count = len(self.ancestors_A)
        into.index_add_(1, self.ancestors_A, part[:, :count])
        into[:, self.queries] += part[:, count:]


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
        total, on_cpu = len(ends_T), device.type == "cpu"
        size = max(64 if on_cpu else 512, -(-total // MAX_CHUNKS))
        self._paths = TreePaths(positions_T) if on_cpu else None
        self._chain = not on_cpu and bool((ends_T == total).all())
        self._chunks = [
            _chunk(ends_T, start, min(start + size, total), device, dtype)
            for start in range(0, 0 if self._chain else total, size)
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self._paths is not None:
            return _AsSampled.apply(  # pyright: ignore
                query, key, value, scale, self._paths, self._chunks
            )
        if self._chain:
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
    """The values of `TreePaths`, and their gradient in chunks, whose few keys take far less
    time and memory than every node's path does. The attention's weights are computed again
    for it rather than kept: they would be most of a layer's memory."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        paths: TreePaths,
        chunks: Sequence[_Chunk],
    ) -> Tensor:
        out = paths.attend(query, key, value, scale)
        ctx.save_for_backward(query, key, value, out)
        ctx.scale, ctx.chunks = scale, chunks
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        (gradient,) = grads
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        inner = torch.linalg.vecdot(gradient.float(), out.float()).t()
        gradient = gradient.transpose(0, 1)
        for chunk in ctx.chunks:
            part = chunk.queries
            d_query[:, part], d_keys, d_values = _gradients(
                query[:, part],
                chunk.keys(key),
                chunk.keys(value),
                chunk.mask,
                ctx.scale,
                gradient[:, part],
                inner[:, part],
            )
            chunk.add_to(d_key, d_keys)
            chunk.add_to(d_value, d_values)
        return d_query, d_key, d_value, None, None, None


def _gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    gradient: Tensor,
    inner: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of attention with `query` [H, n, D] over `key` and `value` [K, M, D], given that of its
    output [H, n, D] and the product of the two for each row, float32 [H, n]: section 3.1 of
    FlashAttention-2 (Dao 2023, arXiv 2307.08691), in plain products. SDPA's own has no fast
    kernel on CPU for grouped heads under a mask."""
    heads, n, dim = query.shape
    kv_heads, keys = key.shape[:2]
    rows, columns = (kv_heads, -1, dim), (kv_heads, -1, keys)
    queries, gradients = query.reshape(rows), gradient.reshape(rows)
    scores = torch.bmm(queries, key.transpose(1, 2)).view(heads, n, keys)
    weights = torch.add(mask, scores, alpha=scale).softmax(-1, dtype=torch.float32)
    d_value = torch.bmm(weights.to(value.dtype).view(columns).transpose(1, 2), gradients)
    d_weights = torch.bmm(gradients, value.transpose(1, 2)).view(heads, n, keys).float()
    d_scores = d_weights.sub_(inner[..., None]).mul_(weights).mul_(scale)
    d_scores = d_scores.to(query.dtype).view(columns)
    d_query = torch.bmm(d_scores, key).view(heads, n, dim)
    return d_query, torch.bmm(d_scores.transpose(1, 2), queries), d_value


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
