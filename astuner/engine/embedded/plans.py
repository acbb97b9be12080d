"""The two attention plans of sampling: many sequences one token further, and prefill.

`DecodePlan` takes one new token of each running sequence and attends over its
slot; `PrefillPlan` takes runs of new tokens of several sequences and attends
over each one's own KV buffer. Both store the new keys and values first, and on
CPU both give a token bitwise the same result: whatever else is in the batch,
wherever a prompt is cut, whether it is prefilled or decoded. Neither computes
logits or moves sequences about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from astuner.engine.embedded.kv_cache import Shelf, whole_blocks

FP32_ROWS = 4
"""A float32 product whose rows are no multiple of this takes another kernel on CPU, which
adds up in another order."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """The batch rows [start, stop) that are the used slots of one shelf."""

    start: int
    stop: int
    kv: Tensor
    """[L, 2, n, K, S, D]: the used slots, whole. Cut to fewer tokens they have gaps, and each
    product copies them first, which takes longer than it saves."""
    mask: Tensor
    """[n * K, 1, S]: 0 where the slot has a token (the new one too), else -inf."""
    index: Tensor
    """[n] slot numbers, for storing."""
    position: Tensor
    """[n] where each slot's new token goes."""


class DecodePlan:
    """One new token for each slot of `shelves`, in their order. Rows of the packed row
    beyond the slots are padding; their output is zero."""

    def __init__(self, shelves: Sequence[Shelf]) -> None:
        self._rows: list[_Rows] = []
        start = 0
        for shelf in shelves:
            self._rows.append(_rows(shelf, start))
            start = self._rows[-1].stop

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        heads, tokens, dim = query.shape
        group = heads // key.shape[0]
        out = query.new_zeros(tokens, heads, dim)
        for rows in self._rows:
            part = slice(rows.start, rows.stop)
            keys, values = rows.kv[layer].unbind(0)
            keys[rows.index, :, rows.position] = key[:, part].transpose(0, 1)
            values[rows.index, :, rows.position] = value[:, part].transpose(0, 1)
            queries = query[:, part].transpose(0, 1).reshape(-1, group, dim)
            attended = two_products(
                queries, keys.flatten(0, 1), values.flatten(0, 1), rows.mask, (-1, group), scale
            )
            out[part] = attended.reshape(-1, heads, dim)
        return out


def _rows(shelf: Shelf, start: int) -> _Rows:
    n, device, kv_heads = len(shelf.slots), shelf.kv.device, shelf.kv.shape[3]
    lengths = torch.tensor([slot.length for slot in shelf.slots])
    mask = torch.zeros(n, 1, shelf.size)
    mask.masked_fill_(torch.arange(shelf.size) > lengths[:, None, None], float("-inf"))
    return _Rows(
        start,
        start + n,
        shelf.kv[:, :, :n],
        mask.repeat_interleave(kv_heads, 0).to(device, shelf.kv.dtype),
        torch.arange(n, device=device),
        lengths.to(device),
    )


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of new tokens of one sequence in the packed row."""

    kv: Tensor
    """[L, 2, K, S, D], S whole blocks >= past + tokens: filled up to `past`, the rest is
    written here."""
    past: int
    tokens: int


class PrefillPlan:
    """Segments one after the other in the packed row; what follows them is padding."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        on_cpu = segments[0].kv.device.type == "cpu"
        self._attend, masks = (_in_blocks, _block_masks) if on_cpu else (_fused, _causal_masks)
        self._masks = [list(masks(segment)) for segment in segments]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        heads, tokens, dim = query.shape
        out = query.new_zeros(tokens, heads, dim)
        start = 0
        for segment, masks in zip(self._segments, self._masks, strict=True):
            part = slice(start, start + segment.tokens)
            keys, values = segment.kv[layer].unbind(0)
            new = slice(segment.past, segment.past + segment.tokens)
            keys[:, new], values[:, new] = key[:, part], value[:, part]
            out[part] = self._attend(query[:, part], keys, values, masks, scale)
            start = part.stop
        return out


# ---------------------------------------------------------------- on CPU


def two_products(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    seen: tuple[int, ...],
    scale: float,
) -> Tensor:
    """queries [B, M, D] over keys and values [B, S, D]; [B, M, D].

    SDPA has no fast CPU kernel for grouped heads under a mask, and for one query it is
    several times slower than this. What is masked adds exact zeros, but where kernels cut a
    sum depends on S (oneDNN's in bfloat16 above 1024 keys, float32's around 256), so each caller
    takes S from a query's position: the end of its block, or the slot whose sizes keep to the
    same cuts. A row's result does not depend on M (see FP32_ROWS).
    """
    weights = attention_weights(queries, keys, mask, seen, scale)
    return torch.bmm(_even(weights), values)[:, : queries.shape[1]]


def attention_weights(
    queries: Tensor, keys: Tensor, mask: Tensor, seen: tuple[int, ...], scale: float
) -> Tensor:
    """Of queries [B, M, D] over keys [B, S, D]; [B, M, S]. The scores, seen as [*seen, S], get
    `mask` of the same dtype added; they are scaled before they are rounded to it, and softmax
    adds up in float32."""
    nothing, count = queries.new_zeros(1, 1, 1), queries.shape[1]
    queries = _even(queries)
    scores = torch.baddbmm(nothing, queries, keys.transpose(1, 2), beta=0, alpha=scale)
    if queries.shape[1] != count:
        scores = scores[:, :count].contiguous()
    reach = keys.shape[1]
    return scores.view(*seen, reach).add_(mask).softmax(-1).view(-1, count, reach)


def _even(rows: Tensor) -> Tensor:
    """[B, M, X] with rows of zeros up to a multiple of FP32_ROWS."""
    missing = -rows.shape[1] % FP32_ROWS
    return F.pad(rows, (0, 0, 0, missing)) if missing and rows.dtype == torch.float32 else rows


def _in_blocks(
    query: Tensor, keys: Tensor, values: Tensor, masks: list[Tensor], scale: float
) -> Tensor:
    """query [H, T, D] over keys and values [K, S, D], those of one block of positions at
    a time; [T, H, D]."""
    heads, tokens, dim = query.shape
    out = query.new_empty(tokens, heads, dim)
    start = 0
    for mask in masks:
        rows, reach = mask.shape
        part = slice(start, start + rows)
        start += rows
        queries = query[:, part].reshape(keys.shape[0], -1, dim)
        seen, read = keys[:, :reach], values[:, :reach]
        attended = two_products(queries, seen, read, mask, (-1, rows), scale)
        out[part] = attended.reshape(heads, rows, dim).transpose(0, 1)
    return out


def _block_masks(segment: Segment) -> Iterator[Tensor]:
    """For each block of positions, the first and last perhaps in part, [rows, reach]: 0 where
    the key is seen, else -inf; `reach` is the block's end, wherever the segment begins."""
    end = segment.past + segment.tokens
    first = segment.past
    while first < end:
        last = min(whole_blocks(first + 1), end)
        mask = torch.zeros(last - first, whole_blocks(last))
        hidden = torch.arange(mask.shape[1]) > torch.arange(first, last)[:, None]
        yield mask.masked_fill_(hidden, float("-inf")).to(segment.kv.dtype)
        first = last


# ---------------------------------------------------------------- elsewhere


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, masks: list[Tensor], scale: float
) -> Tensor:
    """query [H, T, D] over keys and values [K, S, D] under the one mask, or causally over
    the first T; [T, H, D]. Kernels take a mask or grouped heads, not both."""
    heads, tokens, _ = query.shape
    mask = masks[0] if masks else None
    reach = tokens if mask is None else mask.shape[1]
    repeats = 1 if mask is None else heads // keys.shape[0]
    attended = F.scaled_dot_product_attention(
        query[None],
        keys[None, :, :reach].repeat_interleave(repeats, 1),
        values[None, :, :reach].repeat_interleave(repeats, 1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=mask is None,
    )
    return attended[0].transpose(0, 1)


def _causal_masks(segment: Segment) -> Iterator[Tensor]:
    """Nothing where there is no past; else bool [tokens, past + tokens], True where seen."""
    if segment.past:
        end = segment.past + segment.tokens
        positions = torch.arange(segment.past, end, device=segment.kv.device)
        yield torch.arange(end, device=segment.kv.device) <= positions[:, None]
