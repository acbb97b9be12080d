"""The model's two forward passes for sampling: decode and prefill.

Builds the packed row, runs the published weights under the matching attention
plan, and returns logits or fills KV buffers. Sequences under different weights go
through together. No scheduling and no sampling here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from astuner.engine.embedded import packed
from astuner.engine.embedded.kv_cache import KVLayout, Shelf
from astuner.engine.embedded.plans import DecodePlan, PrefillPlan, Segment
from astuner.types import TokenIds

Spans = Sequence[tuple[str, int]]
"""Runs of tokens of a packed row: the name of the weights of each, and how many they are."""


class SamplingWeights(Protocol):
    """What sampling needs to know of the weights."""

    device: torch.device
    dtype: torch.dtype
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def sampling(self, spans: Spans = ()) -> AbstractContextManager[nn.Module]:
        """The model, in eval mode, for one packed row of these tokens under these weights;
        what follows them is padding."""
        ...

    def fits(self, names: Collection[str]) -> bool:
        """Whether one row may hold tokens under all of these weights."""
        ...

    def version_of(self, weights: str) -> int:
        """Their version: it grows whenever what this name stands for changes."""
        ...


def kv_layout(weights: SamplingWeights) -> KVLayout:
    return KVLayout(
        weights.num_layers, weights.num_kv_heads, weights.head_dim, weights.dtype, weights.device
    )


def decode(
    weights: SamplingWeights,
    names: Sequence[str],
    shelves: Sequence[Shelf],
    last_tokens: Sequence[int],
) -> Tensor:
    """Feed each running sequence its last token under the weights of its name, in the order of
    the shelves' slots, at position `slot.length`; stores its KV and returns logits [>= N, V],
    rows beyond N void."""
    positions = [slot.length for shelf in shelves for slot in shelf.slots]
    ids_T, positions_T = _row(np.array(last_tokens), np.array(positions), weights.device)
    keep_N = torch.arange(len(ids_T), device=weights.device)
    with weights.sampling([(name, 1) for name in names]) as model:
        return packed.forward(model, ids_T, positions_T, DecodePlan(shelves), keep_N)


def prefill(
    weights: SamplingWeights,
    names: Sequence[str],
    segments: Sequence[Segment],
    tokens: Sequence[TokenIds],
    *,
    logits: bool = False,
) -> Tensor:
    """Compute and store the KV of each segment's `tokens` under the weights of its name; logits
    [>= N, V] of all of them if asked for, rows beyond N void, else [0, V]."""
    ids = np.concatenate(tokens)
    positions = np.concatenate([np.arange(s.past, s.past + s.tokens) for s in segments])
    ids_T, positions_T = _row(ids, positions, weights.device)
    keep_N = torch.arange(len(ids_T) if logits else 0, device=weights.device)
    spans = [(name, s.tokens) for name, s in zip(names, segments, strict=True)]
    with weights.sampling(spans) as model:
        return packed.forward(model, ids_T, positions_T, PrefillPlan(segments), keep_N)


def _row(
    ids: np.ndarray[tuple[int], np.dtype[np.integer]],
    positions: np.ndarray[tuple[int], np.dtype[np.integer]],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Ids and positions [T] in one transfer, padded with token 0 at position 0."""
    row = np.zeros((2, packed.whole_rows(len(ids))), np.int64)
    row[0, : len(ids)] = ids
    row[1, : len(ids)] = positions
    both = torch.from_numpy(row).to(device)
    return both[0], both[1]
