"""The gradient of attention over a packed row of token tries, for CPU.

In chunks of queries: the keys a chunk can see are the ancestors of its first node and the
chunk itself, far fewer than every node's path has. Chunks with about as many keys are
computed together, since a small product costs little more than its call. The attention's
weights are computed again, and rounded as the values' are, rather than kept: they would be most
of a layer's memory. The layout is made once for each row and serves every layer. No values: see
`tree_paths`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from astuner.engine.embedded.plans import attention_weights
from astuner.engine.embedded.tree_paths import Batch, Ints

CHUNK = 128
"""Queries of a chunk; fewer only in the row's last."""
SCORES = 1 << 18
"""Scores of one head in a batch of chunks: what bounds the memory that a layer takes."""
ALIKE = 0.75
"""Chunks with fewer keys than this part of the batch's are not padded to be of it."""


class TreeGradient:
    """Node i sees node j iff j <= i < ends_T[j] (see `packing.Row`)."""

    def __init__(self, ends_T: Ints, dtype: torch.dtype) -> None:
        chunks = _batched(_chunks(ends_T))
        self._batches = [_batch(together, ends_T, dtype) for together in chunks]

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of query [H, T, D] and of key and value [K, T, D], given that of the output
        [T, H, D]."""
        whole = (x.contiguous() for x in (query, key, value, gradient.transpose(0, 1)))
        query, key, value, gradient = whole  # parts of what has gaps are slow to take
        d_query = torch.empty_like(query)
        kv_heads, total, dim = key.shape
        d_keys = torch.zeros(total, kv_heads * dim)
        d_values = torch.zeros(total, kv_heads * dim)
        for batch in self._batches:
            d_nodes, d_batch_keys, d_batch_values = _gradients(
                batch,
                query.index_select(1, batch.nodes),
                key.index_select(1, batch.keys),
                value.index_select(1, batch.keys),
                scale,
                gradient.index_select(1, batch.nodes),
            )
            d_query.index_copy_(1, batch.nodes, d_nodes)
            d_keys.index_add_(0, batch.keys, d_batch_keys)
            d_values.index_add_(0, batch.keys, d_batch_values)
        d_key, d_value = (
            x.view(total, kv_heads, dim).transpose(0, 1).to(key.dtype) for x in (d_keys, d_values)
        )
        return d_query, d_key, d_value


def _gradients(
    batch: Batch, query: Tensor, key: Tensor, value: Tensor, scale: float, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the batch's attention, with query and gradient [H, B * n, D], key and value
    [K, B * M, D]: [H, B * n, D], and float32 [B * M, K * D] twice. Plain products, as SDPA's own
    has no fast kernel on CPU for grouped heads under a mask."""
    (chunks, rows, reach), (heads, _, dim), kv_heads = batch.shape, query.shape, key.shape[0]
    seen = (kv_heads, chunks, heads // kv_heads, rows)
    queries, gradients = (batch.by_keys(x, kv_heads) for x in (query, gradient))
    keys, values = (x.view(-1, reach, dim) for x in (key, value))
    weights = attention_weights(queries, keys, batch.mask, seen, scale)
    d_weights = torch.bmm(gradients, values.transpose(1, 2))
    d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    d_query = torch.bmm(d_scores, keys).mul_(scale)
    d_query = d_query.view(*seen, dim).transpose(1, 2).reshape(heads, -1, dim)
    d_key = torch.bmm(d_scores.transpose(1, 2), queries).mul_(scale)
    d_value = torch.bmm(weights.transpose(1, 2), gradients)
    return d_query, _by_node(d_key, kv_heads), _by_node(d_value, kv_heads)


def _by_node(x: Tensor, kv_heads: int) -> Tensor:
    """[K * B, M, D] to float32 [B * M, K * D]."""
    dim = x.shape[2]
    by_node = x.view(kv_heads, -1, dim).transpose(0, 1)
    whole = by_node.to(torch.float32, memory_format=torch.contiguous_format)
    return whole.reshape(-1, kv_heads * dim)


# ---------------------------------------------------------------- the layout


@dataclass(frozen=True, slots=True)
class _Chunk:
    nodes: Ints
    keys: Ints


def _chunks(ends_T: Ints) -> Iterator[_Chunk]:
    for start in range(0, len(ends_T), CHUNK):
        nodes = np.arange(start, min(start + CHUNK, len(ends_T)))
        ancestors = np.flatnonzero(ends_T[:start] > start)
        yield _Chunk(nodes, np.concatenate([ancestors, nodes]))


def _batched(chunks: Iterator[_Chunk]) -> Iterator[list[_Chunk]]:
    """Those with as many queries and about as many keys together."""
    ordered = sorted(chunks, key=lambda c: (len(c.nodes), len(c.keys)), reverse=True)
    batch: list[_Chunk] = []
    for chunk in ordered:
        if batch:
            rows, reach = len(batch[0].nodes), len(batch[0].keys)
            full = (len(batch) + 1) * rows * reach > SCORES
            if full or len(chunk.nodes) != rows or len(chunk.keys) < ALIKE * reach:
                yield batch
                batch = []
        batch.append(chunk)
    if batch:
        yield batch


def _batch(chunks: Sequence[_Chunk], ends_T: Ints, dtype: torch.dtype) -> Batch:
    rows, reach = len(chunks[0].nodes), len(chunks[0].keys)
    nodes = np.stack([c.nodes for c in chunks])
    keys = np.stack([np.pad(c.keys, (0, reach - len(c.keys))) for c in chunks])
    filling = np.arange(reach) >= np.array([len(c.keys) for c in chunks])[:, None]
    queries, seen = nodes[:, :, None], keys[:, None, :]
    hidden = (seen > queries) | (queries >= ends_T[seen]) | filling[:, None, :]
    mask = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), float("-inf"))
    return Batch(
        (len(chunks), rows, reach),
        torch.from_numpy(nodes.ravel()),
        torch.from_numpy(keys.ravel()),
        mask[:, None].to(dtype),
    )
