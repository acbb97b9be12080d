"""Attention of the sampler's plans: the same bits as the trainer's, wherever a prompt is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from astuner.engine.embedded.kv_cache import KVLayout, KVPool, whole_blocks
from astuner.engine.embedded.plans import DecodePlan, PrefillPlan, Segment
from astuner.engine.embedded.tree_paths import TreePaths

HEADS, KV_HEADS, DIM, SCALE = 9, 3, 64, 0.125
TOKENS = 1100
"""Past 1024 keys, from where oneDNN cuts sums in bfloat16 another way."""


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def qkv(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = HEADS, KV_HEADS, KV_HEADS
    query, key, value = (torch.randn(n, TOKENS, DIM, generator=generator) for n in shapes)
    return query.to(request.param), key.to(request.param), value.to(request.param)


def layout(dtype: torch.dtype) -> KVLayout:
    return KVLayout(1, KV_HEADS, DIM, dtype, torch.device("cpu"))


def as_trained(qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return TreePaths(np.arange(TOKENS), qkv[0].dtype).attend(*qkv, SCALE)


@pytest.mark.parametrize("cut", [1, 200, 700, 1000, 1024, 1030])
def test_prefill_has_the_trainers_bits_wherever_it_is_cut(
    qkv: tuple[Tensor, Tensor, Tensor], cut: int
) -> None:
    kv = layout(qkv[0].dtype).zeros(whole_blocks(TOKENS))
    parts = [
        PrefillPlan([Segment(kv, start, stop - start)]).attend(
            0, *(x[:, start:stop] for x in qkv), SCALE
        )
        for start, stop in ((0, cut), (cut, TOKENS))
    ]
    assert torch.equal(torch.cat(parts), as_trained(qkv))


def test_decoding_has_the_trainers_bits(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = qkv
    expected = as_trained(qkv)
    for position in (0, 1, 63, 64, 200, 256, 300, 330, 450, 513, 900, 1000, 1023, 1024, 1090):
        pool = KVPool(layout(query.dtype), 10_000, 2048)
        for length in (position, 5, position):  # in one slot of three, and not on the first shelf
            slot = pool.take(length)
            slot.kv[0, 0, :, :length], slot.kv[0, 1, :, :length] = (
                x[:, :length] for x in (key, value)
            )
        at = [slot.length for slot in pool.slots()]
        attended = DecodePlan(pool.shelves()).attend(0, *(x[:, at] for x in qkv), SCALE)
        assert torch.equal(attended, expected[at])
