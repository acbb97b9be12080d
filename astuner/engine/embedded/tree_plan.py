"""Attention over a packed row of token tries: each node sees its ancestors and itself.

On CPU the values are the sampler's own (`tree_paths`), so that the trainer's logprobs
are those that were sampled with. The gradient, and elsewhere the values too, are
computed in chunks of queries: the keys a chunk can see are the ancestors of its first
token and the chunk itself, so the cost grows with the depth of the trie, not with the
length of the row. The masks are built once for each row and used by every layer. No
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

from astuner.engine.embedded.tree_paths import TreePaths

MAX_CHUNKS = 16
"""Every chunk costs a few kernel launches a layer; long rows get larger chunks."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    queries: slice
    keys_M: Tensor
    """Node of each key."""
    mask: Tensor
    """[n, M] in the compute dtype: 0 where the key may be seen, else -inf."""


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
        self._attend = _two_products if on_cpu else _fused
        self._chunks = [
            _chunk(ends_T, start, min(start + size, total), device, dtype)
            for start in range(0, 0 if self._chain else total, size)
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self._chain:
            return _fused(query, key, value, None, scale)
        if self._paths is None:
            return self.in_chunks(query, key, value, scale)
        return _AsSampled.apply(query, key, value, scale, self, self._paths)  # pyright: ignore

    def in_chunks(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        parts = [
            self._attend(
                query[:, chunk.queries],
                key.index_select(1, chunk.keys_M),
                value.index_select(1, chunk.keys_M),
                chunk.mask,
                scale,
            )
            for chunk in self._chunks
        ]
        return torch.cat(parts)


class _AsSampled(torch.autograd.Function):
    """The values of `TreePaths`, with the gradient of the same attention in chunks: its few
    keys take far less time and memory than every node's path. Its weights are computed
    again then rather than kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        plan: TreePlan,
        paths: TreePaths,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.plan = scale, plan
        return paths.attend(query, key, value, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.plan.in_chunks(*inputs, ctx.scale)
        return *torch.autograd.grad(out, inputs, grads[0]), None, None, None


def _chunk(
    ends_T: NDArray[np.int64], start: int, stop: int, device: torch.device, dtype: torch.dtype
) -> _Chunk:
    ancestors = np.flatnonzero(ends_T[:start] > start)
    keys = np.concatenate([ancestors, np.arange(start, stop)])
    nodes = np.arange(start, stop)[:, None]
    seen = torch.from_numpy((keys <= nodes) & (nodes < ends_T[keys]))
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return _Chunk(slice(start, stop), torch.from_numpy(keys).to(device), mask.to(device))


def _two_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query [H, n, D], key and value [K, M, D], mask [n, M]; [n, H, D].

    On CPU forward and backward together take half of SDPA's time, which has no fast
    kernel there for grouped heads under a mask.
    """
    heads, n, dim = query.shape
    kv_heads = key.shape[0]
    grouped = query.reshape(kv_heads, -1, dim)
    scores = torch.bmm(grouped, key.transpose(1, 2)).view(heads, n, -1)
    scores = torch.add(mask, scores, alpha=scale)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    out = torch.bmm(weights.view(kv_heads, -1, key.shape[1]), value)
    return out.view(heads, n, dim).transpose(0, 1)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same by SDPA; without a mask, causal. Heads are repeated because the kernels
    that take a mask do not take grouped heads."""
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
