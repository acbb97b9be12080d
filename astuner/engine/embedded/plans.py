"""The two attention plans of sampling: many sequences one token further, and prefill.

`DecodePlan` takes one new token of each running sequence and attends over its
slot; `PrefillPlan` takes runs of new tokens of several sequences and attends
over each one's own KV buffer. Both store the new keys and values first. Neither
computes logits or moves sequences about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from astuner.engine.embedded.kv_cache import BLOCK, Shelf


@dataclass(frozen=True, slots=True)
class _Rows:
    """The batch rows [start, stop) that are the used slots of one shelf."""

    start: int
    stop: int
    kv: Tensor
    """[L, 2, n, K, S, D]: used slots, cut at the longest sequence, rounded up to BLOCK."""
    mask: Tensor
    """[n, 1, S] float32: 0 where the slot has a token (the new one included), else -inf."""
    index: Tensor
    """[n] slot numbers, for storing."""
    position: Tensor
    """[n] where each slot's new token goes."""


class DecodePlan:
    """One new token for each slot of `shelves`, in their order.

    The result of a row is bitwise the same whatever the other rows are and however far
    the view reaches: two `bmm`s and a float32 softmax treat rows alike, and masked
    positions add exact zeros. (SDPA with a mask and one query is several times slower on
    CPU.) Rows of the packed row beyond the slots are padding; their output is zero.
    """

    def __init__(self, shelves: Sequence[Shelf]) -> None:
        self._rows: list[_Rows] = []
        start = 0
        for shelf in shelves:
            self._rows.append(_rows(shelf, start))
            start = self._rows[-1].stop

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        heads, tokens, dim = query.shape
        out = query.new_zeros(tokens, heads, dim)
        for rows in self._rows:
            part = slice(rows.start, rows.stop)
            keys, values = rows.kv[layer].unbind(0)
            keys[rows.index, :, rows.position] = key[:, part].transpose(0, 1)
            values[rows.index, :, rows.position] = value[:, part].transpose(0, 1)
            out[part] = _attend_slots(query[:, part], keys, values, rows.mask, scale)
        return out


def _rows(shelf: Shelf, start: int) -> _Rows:
    n, device = len(shelf.slots), shelf.kv.device
    lengths = torch.tensor([slot.length for slot in shelf.slots])
    view = min(shelf.size, -(-(int(lengths.max()) + 1) // BLOCK) * BLOCK)
    mask = torch.zeros(n, 1, view)
    mask.masked_fill_(torch.arange(view) > lengths[:, None, None], float("-inf"))
    return _Rows(
        start,
        start + n,
        shelf.kv[:, :, :n, :, :view],
        mask.to(device),
        torch.arange(n, device=device),
        lengths.to(device),
    )


def _attend_slots(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """query [H, n, D] over keys, values [n, K, S, D] under mask [n, 1, S]; [n, H, D]."""
    n, kv_heads, length, dim = keys.shape
    heads = query.shape[0]
    grouped = query.transpose(0, 1).reshape(n * kv_heads, heads // kv_heads, dim)
    scores = torch.bmm(grouped, keys.flatten(0, 1).transpose(1, 2))
    scores = scores.view(n, heads, length).float().mul_(scale).add_(mask)
    weights = scores.softmax(-1).to(values.dtype).view(n * kv_heads, -1, length)
    return torch.bmm(weights, values.flatten(0, 1)).view(n, heads, dim)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of new tokens of one sequence in the packed row."""

    kv: Tensor
    """[L, 2, K, >= past + tokens, D]: filled up to `past`, the rest is written here."""
    past: int
    tokens: int


class PrefillPlan:
    """Segments one after the other in the packed row; what follows them is padding."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._masks = [_lower_right_causal(s) for s in segments]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        heads, tokens, dim = query.shape
        out = query.new_zeros(tokens, heads, dim)
        start = 0
        for segment, mask in zip(self._segments, self._masks, strict=True):
            part = slice(start, start + segment.tokens)
            end = segment.past + segment.tokens
            keys, values = segment.kv[layer, :, :, :end].unbind(0)
            keys[:, segment.past :] = key[:, part]
            values[:, segment.past :] = value[:, part]
            out[part] = _attend_causally(query[:, part], keys, values, mask, scale)
            start = part.stop
        return out


def _attend_causally(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """query [H, T, D] over keys, values [K, S, D]; [T, H, D]."""
    if mask is not None and query.device.type != "cpu":
        # kernels there take a mask or grouped heads, not both
        repeats = query.shape[0] // keys.shape[0]
        keys, values = keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0)
    attended = F.scaled_dot_product_attention(
        query[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[0] != keys.shape[0],
    )
    return attended[0].transpose(0, 1)


def _lower_right_causal(segment: Segment) -> Tensor | None:
    """None where plain causal masking does (no past); else bool [tokens, past + tokens],
    True where the key may be seen."""
    if segment.past == 0:
        return None
    end = segment.past + segment.tokens
    device = segment.kv.device
    positions = torch.arange(segment.past, end, device=device)
    return torch.arange(end, device=device) <= positions[:, None]
