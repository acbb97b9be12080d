"""The base's linear layers in groups, against the model's own layers and plain autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from astuner.engine.embedded import linears
from astuner.engine.embedded.linears import Lora, grouped

pytestmark = pytest.mark.timeout(60)
DTYPES = [torch.float32, torch.bfloat16]
TOKENS = (8, 16, 64, 136)


class Attention(nn.Module):
    """As transformers' layers call their siblings: with one and the same tensor."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(48, 64, bias=bias)
        self.k_proj = nn.Linear(48, 16, bias=bias)
        self.v_proj = nn.Linear(48, 16, bias=bias)
        self.o_proj = nn.Linear(64, 48)
        self.turned = Conv1D(24, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.turned(self.o_proj(q * torch.cat([k, v, k, v], -1)))


def model(dtype: torch.dtype, *, bias: bool = False) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(Attention(bias=bias)).to(dtype).requires_grad_(False)


def matrices(wanted: dict[int, int]) -> dict[int, tuple[Tensor, Tensor]]:
    """A and B of rank 4 for the layers of these numbers, with their widths."""
    return {
        i: (
            (0.3 * torch.randn(4, 48)).requires_grad_(),
            (0.3 * torch.randn(width, 4)).requires_grad_(),
        )
        for i, width in wanted.items()
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_compute_what_the_layers_did(dtype: torch.dtype, bias: bool) -> None:
    mine = model(dtype, bias=bias)
    plain = copy.deepcopy(mine)
    groups = grouped(mine)
    names = [group.names for group in groups]
    assert names == [("0.q_proj", "0.k_proj", "0.v_proj"), ("0.o_proj",), ("0.turned",)]
    assert groups[0].widths == (64, 16, 16)
    for tokens in TOKENS:
        x = torch.randn(1, tokens, 48, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(mine(x), plain(x))
    assert mine.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(v, mine.state_dict()[n]) for n, v in plain.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_among_any_others(dtype: torch.dtype) -> None:
    mine = model(dtype)
    grouped(mine)
    x = torch.randn(1, 136, 48, dtype=dtype)
    with torch.no_grad():
        whole = mine(x)
        assert all(torch.equal(mine(x[:, :n]), whole[:, :n]) for n in TOKENS)
        assert mine(x[:, :0]).shape == (1, 0, 24)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_where_there_is_no_packing_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = model(torch.float32), model(torch.float32)
    assert grouped(packed)[0]._packed is not None
    monkeypatch.setattr(linears, "_packed", lambda weight: None)
    assert grouped(plain)[0]._packed is None
    x = torch.randn(1, 16, 48)
    torch.testing.assert_close(packed(x), plain(x))


def test_siblings_that_get_different_inputs_are_computed_apart() -> None:
    mine = model(torch.float32)[0]
    plain = copy.deepcopy(mine)
    grouped(mine)
    x, y = torch.randn(2, 1, 8, 48)
    for layer, inputs in (("q_proj", x), ("k_proj", y), ("v_proj", y), ("v_proj", x)):
        torch.testing.assert_close(getattr(mine, layer)(inputs), getattr(plain, layer)(inputs))


def test_changed_weights_count_once_they_are_packed() -> None:
    mine = model(torch.float32, bias=True)
    groups, plain = grouped(mine), copy.deepcopy(model(torch.float32, bias=True))
    for one in (mine, plain):
        for layer in (one[0].k_proj, one[0].o_proj):
            layer.weight.data.mul_(2)
            layer.bias.data.add_(1)
    for group in groups:
        group.pack()
    x = torch.randn(1, 8, 48)
    torch.testing.assert_close(mine(x), plain(x))


@pytest.mark.parametrize("wanted", [{0: 64, 1: 16, 2: 16}, {2: 16}, {0: 64, 2: 16}])
def test_gradients_of_an_adapter_are_those_of_plain_autograd(wanted: dict[int, int]) -> None:
    mine = model(torch.float32)
    group = grouped(mine)[0]
    lora = matrices(wanted)
    group.lora = Lora(lora, 1.5)
    x = torch.randn(1, 16, 48, requires_grad=True)
    out = torch.cat([layer(x) for layer in (mine[0].q_proj, mine[0].k_proj, mine[0].v_proj)], -1)

    parts = []
    for i, layer in enumerate((mine[0].q_proj, mine[0].k_proj, mine[0].v_proj)):
        part = F.linear(x, layer.weight)
        if i in lora:
            part = part + 1.5 * F.linear(F.linear(x, lora[i][0]), lora[i][1])
        parts.append(part)
    expected = torch.cat(parts, -1)
    torch.testing.assert_close(out, expected)

    weights = torch.randn_like(out)
    leaves = [x, *(m for pair in lora.values() for m in pair)]
    got, wanted_ones = (torch.autograd.grad((y * weights).sum(), leaves) for y in (out, expected))
    torch.testing.assert_close(got, wanted_ones, rtol=1e-4, atol=1e-5)


def test_a_pass_that_broke_off_leaves_nothing_once_it_is_dropped() -> None:
    mine = model(torch.float32)
    group = grouped(mine)[0]
    x = torch.randn(1, 8, 48, requires_grad=True)
    mine[0].q_proj(x)
    assert group._outputs
    group.drop()
    assert not group._outputs and group._input is None
    for layer in (mine[0].v_proj, mine[0].k_proj, mine[0].q_proj):  # in whatever order
        layer(x)
    assert not group._outputs and group._input is None


class Router(nn.Linear):
    """As some models have them: more than a linear layer."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(input)
        return logits, logits.argmax(-1)


def test_layers_that_do_more_are_left_alone() -> None:
    mixed = nn.ModuleDict({"router": Router(48, 4), "o_proj": nn.Linear(48, 8)})
    assert [group.names for group in grouped(mixed.requires_grad_(False))] == [("o_proj",)]
    assert len(mixed["router"](torch.randn(1, 8, 48))) == 2
