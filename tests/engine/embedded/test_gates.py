"""Gated MLPs, against transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from astuner.engine.embedded import packed
from astuner.engine.embedded.gates import gated
from astuner.engine.embedded.linears import grouped
from tests.engine.embedded.tiny import tiny_model

pytestmark = pytest.mark.timeout(60)


def mlp(kind: Any = LlamaMLP, act: str = "silu", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act=act)
    return kind(config).to(dtype).requires_grad_(False)


def value_and_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    torch.manual_seed(2)
    return y.detach(), torch.autograd.grad(y, x, torch.randn_like(y))[0]


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [packed.CHUNK_ELEMENTS, 400])
def test_values_and_gradients_have_the_bits_of_transformers(
    act: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "CHUNK_ELEMENTS", chunk)
    theirs = mlp(act=act, dtype=dtype)
    ours = copy.deepcopy(theirs)
    grouped(theirs)
    grouped(ours)
    assert gated(ours) == [""]
    for tokens in (0, 8, 40):
        x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        for mine, other in zip(
            value_and_gradient(ours, x), value_and_gradient(theirs, x), strict=True
        ):
            assert torch.equal(mine, other)
        with torch.no_grad():
            assert torch.equal(ours(x), theirs(x))


def kept(module: nn.Module, x: Tensor) -> int:
    """Bytes of what is kept for the backward pass beside weights, each memory once."""
    memory = dict[int, int]()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def count(saved: Tensor) -> Tensor:
        memory[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        module(x.detach().requires_grad_())
    return sum(n for pointer, n in memory.items() if pointer not in weights)


def test_the_activation_is_not_kept() -> None:
    theirs = mlp()
    ours = copy.deepcopy(theirs)
    gated(ours)
    x = torch.randn(1, 40, 32)
    assert kept(theirs, x) - kept(ours, x) == 40 * 48 * x.element_size()


def test_operations_can_be_counted() -> None:
    ours = mlp()
    gated(ours)
    with FlopCounterMode(display=False) as counted:
        ours(torch.randn(1, 8, 32, requires_grad=True)).sum().backward()
    assert counted.get_total_flops() == 3 * 2 * 2 * 8 * 32 * 48  # forward, and back to the input


def test_gradients_are_those_of_an_activation_that_a_hook_changes() -> None:
    theirs = mlp()
    ours = copy.deepcopy(theirs)
    gated(ours)
    for module in (ours, theirs):
        module.act_fn.register_forward_hook(lambda *called: called[-1] * 2)
    x = torch.randn(1, 8, 32)
    for mine, other in zip(value_and_gradient(ours, x), value_and_gradient(theirs, x), strict=True):
        torch.testing.assert_close(mine, other)


class Halved(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Dropping(LlamaMLP):
    p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * self.p)


class Routed(LlamaMLP):
    def forward(self, x: Tensor, routes: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * routes


class Learnt(LlamaMLP):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.act_fn = nn.PReLU()


@pytest.mark.parametrize("kind", [Halved, Dropping, Routed, Learnt])
def test_modules_that_compute_anything_else_are_left_alone(kind: Any) -> None:
    other = mlp(kind)
    assert gated(other) == []
    assert "forward" not in vars(other)


def test_the_mlps_of_a_model_are_found() -> None:
    assert gated(tiny_model("qwen3")) == ["model.layers.0.mlp", "model.layers.1.mlp"]
