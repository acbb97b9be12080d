"""Attention over a packed row of token tries, computed as the sampler computes it.

Each node attends over its path from the root, laid out by position in whole blocks, by
the products that decode and prefill use, so that on CPU a token's result is to the bit
what it was when the token was sampled, however the row is packed. Runs of nodes that
have equally long paths are computed together. The layout is made once for each row and
serves every layer. No gradient: see `tree_plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from astuner.engine.embedded.kv_cache import BLOCK, whole_blocks
from astuner.engine.embedded.plans import FP32_ROWS, two_products

Ints = NDArray[np.int64]
GATHERED = 1 << 15
"""Keys, repeats counted, of one product: what bounds the memory that a layer takes."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Nodes [start, stop), each the child of the one before it, of one block of positions."""

    start: int
    stop: int
    path: Ints
    """[S] the nodes from the root to the last of the run, by position; then node 0 up to a
    whole block."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Attention of B pieces of a row that is computed together: n queries and S keys each."""

    shape: tuple[int, int, int]
    """(B, n, S)"""
    nodes: Tensor
    """[B * n] the queries."""
    keys: Tensor
    """[B * S] nodes; filled up with any that the mask hides."""
    mask: Tensor
    """[B, 1, n, S]: 0 where the key is seen, else -inf."""

    def by_keys(self, of: Tensor, kv_heads: int) -> Tensor:
        """[K * B, H / K * n, D] of [H, B * n, D]: what shares its keys stands together."""
        pieces, rows, _ = self.shape
        split = of.view(kv_heads, -1, pieces, rows, of.shape[2])
        return split.transpose(1, 2).reshape(kv_heads * pieces, -1, of.shape[2])


@dataclass(slots=True)
class _Growing:
    rows: int
    """Queries of each run in the batch: a shorter run's last node is repeated."""
    runs: list[_Run] = field(default_factory=list[_Run])


class TreePaths:
    """`positions_T`: each node's depth, in depth-first order (see `packing.Row`)."""

    def __init__(self, positions_T: Ints, dtype: torch.dtype) -> None:
        places = np.empty(len(positions_T), np.int64)
        self._batches: list[Batch] = []
        row = 0
        for runs in _batched(_runs(positions_T)):
            rows = runs.rows
            for run in runs.runs:
                places[run.start : run.stop] = row + np.arange(run.stop - run.start)
                row += rows
            self._batches.append(_batch(runs, positions_T, dtype))
        self._places_T = torch.from_numpy(places)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [H, T, D], key and value [K, T, D]; [T, H, D]."""
        query, key, value = (x.contiguous() for x in (query, key, value))
        parts = [_attend(batch, query, key, value, scale) for batch in self._batches]
        return torch.cat(parts).index_select(0, self._places_T)


def _attend(batch: Batch, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The outputs [B * n, H, D] of the batch's nodes."""
    runs, rows, reach = batch.shape
    (heads, _, dim), kv_heads = query.shape, key.shape[0]
    queries = batch.by_keys(query.index_select(1, batch.nodes), kv_heads)
    keys, values = (x.index_select(1, batch.keys).view(-1, reach, dim) for x in (key, value))
    seen = (kv_heads, runs, heads // kv_heads, rows)
    out = two_products(queries, keys, values, batch.mask, seen, scale)
    return out.view(*seen, dim).permute(1, 3, 0, 2, 4).reshape(runs * rows, heads, dim)


def _runs(positions_T: Ints) -> Iterator[_Run]:
    follows = np.diff(positions_T, prepend=-1) == 1
    starts = np.flatnonzero(~follows | (positions_T % BLOCK == 0))
    path = np.zeros(whole_blocks(int(positions_T.max()) + 1), np.int64)
    for start, stop in zip(starts, [*starts[1:], len(positions_T)], strict=True):
        end = int(positions_T[stop - 1]) + 1
        path[end - (stop - start) : end] = np.arange(start, stop)
        whole = path[: whole_blocks(end)].copy()
        whole[end:] = 0
        yield _Run(int(start), int(stop), whole)


def _batched(runs: Iterator[_Run]) -> Iterator[_Growing]:
    """Those with equally long paths and about as many nodes together."""
    growing: dict[tuple[int, int], _Growing] = {}
    for run in runs:
        rows = max(FP32_ROWS, 1 << (run.stop - run.start - 1).bit_length())
        kind = len(run.path), rows
        batch = growing.setdefault(kind, _Growing(rows))
        batch.runs.append(run)
        if (len(batch.runs) + 1) * len(run.path) > GATHERED:
            yield growing.pop(kind)
    yield from growing.values()


def _batch(growing: _Growing, positions_T: Ints, dtype: torch.dtype) -> Batch:
    runs, rows = growing.runs, growing.rows
    nodes = np.stack([np.minimum(r.start + np.arange(rows), r.stop - 1) for r in runs])
    reach = len(runs[0].path)
    positions = torch.from_numpy(positions_T[nodes])[:, None, :, None]
    mask = torch.zeros(len(runs), 1, rows, reach)
    mask.masked_fill_(torch.arange(reach) > positions, float("-inf"))
    keys = torch.from_numpy(np.concatenate([r.path for r in runs]))
    return Batch((len(runs), rows, reach), torch.from_numpy(nodes.ravel()), keys, mask.to(dtype))
