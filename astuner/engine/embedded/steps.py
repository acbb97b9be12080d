"""The model's two forward passes for sampling: decode and prefill.

Builds the packed row, runs the published weights under the matching attention
plan, and returns logits or fills KV buffers. Rows are padded to a multiple of
`ROWS` tokens: with other counts some CPU kernels (float32 matrix products,
SiLU) treat the last rows differently, and a token's logits would depend on how
many others are in the batch. No scheduling and no sampling here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from astuner.engine.embedded import packed
from astuner.engine.embedded.kv_cache import KVLayout, Shelf
from astuner.engine.embedded.plans import DecodePlan, PrefillPlan, Segment
from astuner.types import TokenIds

ROWS = 8


class SamplingWeights(Protocol):
    """What sampling needs to know of the weights."""

    device: torch.device
    dtype: torch.dtype
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def sampling(self, weights: str = "") -> AbstractContextManager[nn.Module]:
        """The model with the weights of this name active, in eval mode."""
        ...

    def version_of(self, weights: str) -> int:
        """Their version: it grows whenever what this name stands for changes."""
        ...


def kv_layout(weights: SamplingWeights) -> KVLayout:
    return KVLayout(
        weights.num_layers, weights.num_kv_heads, weights.head_dim, weights.dtype, weights.device
    )


def decode(
    weights: SamplingWeights, name: str, shelves: Sequence[Shelf], last_tokens: Sequence[int]
) -> Tensor:
    """Feed each running sequence of the weights `name` its last token, in the order of the
    shelves' slots, at position `slot.length`; stores its KV and returns logits [>= N, V],
    rows beyond N void."""
    positions = [slot.length for shelf in shelves for slot in shelf.slots]
    ids_T, positions_T = _row(np.array(last_tokens), np.array(positions), weights.device)
    keep_N = torch.arange(len(ids_T), device=weights.device)
    with weights.sampling(name) as model:
        return packed.forward(model, ids_T, positions_T, DecodePlan(shelves), keep_N)


def prefill(
    weights: SamplingWeights,
    name: str,
    segments: Sequence[Segment],
    tokens: Sequence[TokenIds],
    *,
    logits: bool = False,
) -> Tensor:
    """Compute and store the KV of each segment's `tokens`; logits [>= N, V] of all of them
    if asked for, rows beyond N void, else [0, V]."""
    ids = np.concatenate(tokens)
    positions = np.concatenate([np.arange(s.past, s.past + s.tokens) for s in segments])
    ids_T, positions_T = _row(ids, positions, weights.device)
    keep_N = torch.arange(len(ids_T) if logits else 0, device=weights.device)
    with weights.sampling(name) as model:
        return packed.forward(model, ids_T, positions_T, PrefillPlan(segments), keep_N)


def _row(
    ids: np.ndarray[tuple[int], np.dtype[np.integer]],
    positions: np.ndarray[tuple[int], np.dtype[np.integer]],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Ids and positions [T] in one transfer, padded with token 0 at position 0."""
    row = np.zeros((2, -(-len(ids) // ROWS) * ROWS), np.int64)
    row[0, : len(ids)] = ids
    row[1, : len(ids)] = positions
    both = torch.from_numpy(row).to(device)
    return both[0], both[1]
