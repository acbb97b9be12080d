"""Samples to packed rows: every shared prefix is computed once.

The samples, sorted by their token ids, are a token trie in depth-first order: each
adds the nodes that the one before it did not have. A row is such a trie (a forest
when nothing is shared) written out node by node, so that node i attends to node j
exactly if j <= i < ends[j]. Work and memory are linear in the samples' tokens.
Pure numpy; no tensors and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from astuner.types import Sample, TokenIds

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One micro-batch. `_T`: nodes; `_R`: nodes whose logits are needed; `_N`: trained
    tokens, those of one sample together and in order."""

    ids_T: Ints
    positions_T: Ints
    """Depth in the trie: the token's place in its sample."""
    ends_T: Ints
    """One past the last node of the subtree."""
    sources_R: Ints
    """Ascending, without repeats."""
    source_N: Ints
    """Which of `sources_R` predicts this token."""
    targets_N: Ints
    samples: Ints
    """Index of each of the row's samples in the sequence that was packed."""
    segments_N: Ints
    """Index into `samples`."""


def pack(samples: Sequence[Sample], budget: int) -> list[Row]:
    """Rows of at most `budget` nodes; a sample longer than that gets a row of its own.

    Samples are never split; when a trie is, the next row repeats the shared prefix.
    Samples without a trained token are left out. A node is kept only where a trained
    token comes after it: the last trained token is a target, never an input.
    """
    inputs = {i: _inputs(s) for i, s in enumerate(samples) if s.loss_mask.any()}
    order = sorted(inputs, key=lambda i: (_sortable(inputs[i]), i))
    rows: list[Row] = []
    builder = _RowBuilder()
    for i in order:
        if builder.size and builder.size + builder.new_nodes(inputs[i]) > budget:
            rows.append(builder.build())
            builder = _RowBuilder()
        builder.add(i, inputs[i], samples[i])
    return [*rows, builder.build()] if builder.size else rows


def _inputs(sample: Sample) -> TokenIds:
    return sample.token_ids[: int(np.flatnonzero(sample.loss_mask)[-1])]


def _sortable(ids: TokenIds) -> bytes:
    """Big-endian, so that bytes compare as the ids do."""
    return ids.astype(">u4").tobytes()


class _RowBuilder:
    """Grows one row, a sample at a time, in sorted order."""

    def __init__(self) -> None:
        self.size = 0
        self._ids: list[Ints] = []
        self._positions: list[Ints] = []
        self._closed: list[tuple[Ints, int]] = []
        self._last: TokenIds = np.empty(0, np.int32)
        self._path: Ints = np.empty(0, np.int64)
        """The node of each token of the last sample."""
        self._samples: list[int] = []
        self._sources: list[Ints] = []
        self._targets: list[Ints] = []

    def new_nodes(self, ids: TokenIds) -> int:
        return len(ids) - _common_prefix(self._last, ids)

    def add(self, index: int, ids: TokenIds, sample: Sample) -> None:
        shared = _common_prefix(self._last, ids)
        added = len(ids) - shared
        self._closed.append((self._path[shared:], self.size))
        new = np.arange(self.size, self.size + added, dtype=np.int64)
        self._path = np.concatenate([self._path[:shared], new])
        self._last = ids
        self.size += added
        self._ids.append(ids[shared:].astype(np.int64))
        self._positions.append(np.arange(shared, len(ids), dtype=np.int64))
        trained = np.flatnonzero(sample.loss_mask)
        self._samples.append(index)
        self._sources.append(self._path[trained - 1])
        targets = sample.token_ids if sample.target_ids is None else sample.target_ids
        self._targets.append(targets[trained].astype(np.int64))

    def build(self) -> Row:
        ends_T = np.full(self.size, self.size, np.int64)
        for nodes, end in self._closed:
            ends_T[nodes] = end
        sources_R, source_N = np.unique(np.concatenate(self._sources), return_inverse=True)
        counts = [len(t) for t in self._targets]
        return Row(
            np.concatenate(self._ids),
            np.concatenate(self._positions),
            ends_T,
            sources_R,
            source_N.reshape(-1),
            np.concatenate(self._targets),
            np.array(self._samples, np.int64),
            np.repeat(np.arange(len(counts)), counts),
        )


def padded(row: Row, multiple: int) -> Row:
    """With as many more nodes and sources as bring both to a multiple: roots of their own,
    token 0 each, and sources that nothing is read from."""
    total = len(row.ids_T)
    nodes, sources = -total % multiple, -len(row.sources_R) % multiple
    return replace(
        row,
        ids_T=np.pad(row.ids_T, (0, nodes)),
        positions_T=np.pad(row.positions_T, (0, nodes)),
        ends_T=np.append(row.ends_T, np.arange(total, total + nodes) + 1),
        sources_R=np.pad(row.sources_R, (0, sources)),
    )


def _common_prefix(a: TokenIds, b: TokenIds) -> int:
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n
