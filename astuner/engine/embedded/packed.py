"""One packed row through an unmodified transformers model.

Decoding, prefill and training all call the model with a single row of T tokens
[1, T]; who may attend to whom, and where keys and values are kept, is the
business of an `AttentionPlan` that rides along as a keyword argument. So any
model whose attention goes through transformers' attention interface works
without a forward pass of our own. This module knows no cache and no loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "astuner"
"""The name to load a model with: `from_pretrained(..., attn_implementation=ATTENTION)`."""
ROWS = 8
"""Rows are padded to a multiple of this: with other counts some CPU kernels (float32 matrix
products, SiLU) treat the last tokens differently, and a token's result would depend on how
many others there are."""
CHUNK_ELEMENTS = 1 << 18
"""Numbers of a chunk of rows on a CPU, so few that they stay in its cache."""


def whole_rows(tokens: int) -> int:
    """Rounded up to a multiple of ROWS."""
    return -(-tokens // ROWS) * ROWS


def in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of all of them, a few at a time, as many as the first one's width allows; a
    GPU takes all at once. One that is written to has to be contiguous."""
    rows = [x.reshape(-1, x.shape[-1]) for x in tensors]
    if rows[0].device.type != "cpu":
        yield tuple(rows)
        return
    size = max(1, CHUNK_ELEMENTS // rows[0].shape[1] // ROWS) * ROWS
    yield from zip(*(x.split(size) for x in rows), strict=True)


class AttentionPlan(Protocol):
    """Decides, for one forward pass, what each of the row's T tokens attends to."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [H, T, D], key and value [K, T, D] with H a multiple of K, rotary already
        applied; returns [T, H, D]."""
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    plan: AttentionPlan,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x.squeeze(0) for x in (query, key, value))
    return plan.attend(cast(int, module.layer_idx), query, key, value, scale).unsqueeze(0), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The plan knows who attends to whom; transformers need not build a mask."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def forward(
    model: nn.Module, ids_T: Tensor, positions_T: Tensor, plan: AttentionPlan, keep_N: Tensor
) -> Tensor:
    """Logits [N, V] at the positions `keep_N` of the packed row `ids_T`."""
    out = model(
        input_ids=ids_T[None],
        position_ids=positions_T[None],
        use_cache=False,
        logits_to_keep=keep_N,
        plan=plan,
    )
    return out.logits.squeeze(0)  # whose gradient, unlike that of [0], is no copy
