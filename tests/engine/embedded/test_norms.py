"""The base's norms, against transformers' own and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from astuner.engine.embedded import packed
from astuner.engine.embedded.norms import lightened
from tests.engine.embedded.tiny import tiny_model

pytestmark = pytest.mark.timeout(60)
DTYPES = [torch.float32, torch.bfloat16]
KINDS: list[Any] = [LlamaRMSNorm, Qwen3RMSNorm]


def pair(kind: Any, dtype: torch.dtype, width: int = 48, *, eps: float = 1e-5) -> tuple[Any, Any]:
    """The same norm as transformers has it, and as ours."""
    both = []
    for _ in range(2):
        torch.manual_seed(0)
        norm = kind(width, eps)
        nn.init.normal_(norm.weight)
        both.append(norm.to(dtype).requires_grad_(False))
    assert lightened(both[1]) == [""]
    return both[0], both[1]


def inputs_of(dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows of a model; heads as q_norm gets them; with gaps in memory; none; large and small."""
    torch.manual_seed(1)
    row = torch.randn(1, 40, 48).to(dtype)
    heads = torch.randn(1, 40, 3, 48).to(dtype)
    return {
        "row": row,
        "heads": heads,
        "turned": heads.transpose(1, 2),
        "gaps": torch.randn(1, 24, 96).to(dtype)[..., ::2],
        "none": row[:, :0],
        "large and small": row * torch.logspace(-5, 3, 40)[:, None].to(dtype),
    }


def value_and_gradient(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    torch.manual_seed(2)
    return y, torch.autograd.grad(y, x, torch.randn_like(y))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_have_the_bits_of_transformers(kind: Any, dtype: torch.dtype) -> None:
    theirs, ours = pair(kind, dtype)
    for name, x in inputs_of(dtype).items():
        y, _ = value_and_gradient(ours, x)
        assert type(y.grad_fn).__name__ == "_NormBackward"
        assert y.dtype == dtype and torch.equal(y, theirs(x)), name
        with torch.no_grad():
            assert torch.equal(ours(x), theirs(x)), name


@pytest.mark.parametrize("chunk", [packed.CHUNK_ELEMENTS, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_plain_autograd(
    kind: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "CHUNK_ELEMENTS", chunk)
    theirs, ours = pair(kind, torch.float32)
    for name, x in inputs_of(torch.float32).items():
        got, wanted = (value_and_gradient(norm, x)[1] for norm in (ours, theirs))
        assert got.shape == x.shape, name
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_gradient_in_bfloat16_is_no_further_from_the_exact_one() -> None:
    theirs, ours = pair(LlamaRMSNorm, torch.bfloat16)
    x = inputs_of(torch.bfloat16)["row"]
    exact_norm, _ = pair(LlamaRMSNorm, torch.float32)
    exact_norm.weight.copy_(theirs.weight)
    exact_x = x.float().requires_grad_()
    torch.manual_seed(2)
    upstream = torch.randn_like(x).float()
    exact = torch.autograd.grad(exact_norm(exact_x), exact_x, upstream)[0]
    off = [(value_and_gradient(norm, x)[1].float() - exact).abs().mean() for norm in (ours, theirs)]
    assert off[0] <= off[1]


def kept(norm: Any, x: Tensor) -> int:
    """Bytes of what is kept for the backward pass, each memory once."""
    memory: dict[int, int] = {}

    def count(saved: Tensor) -> Tensor:
        memory[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        norm(x.detach().requires_grad_())
    return sum(memory.values())


def test_half_as_much_is_kept() -> None:
    theirs, ours = pair(LlamaRMSNorm, torch.bfloat16)
    x, weight = inputs_of(torch.bfloat16)["row"], theirs.weight
    number = 40 * 4
    assert kept(theirs, x) >= 2 * x.nbytes + weight.nbytes + number
    assert kept(ours, x) == x.nbytes + weight.nbytes + number


class HalfRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) / 2


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        normed = super().forward(hidden_states)
        return normed if gate is None else normed * gate


class BiasedRMSNorm(LlamaRMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(width))


@pytest.mark.parametrize(
    "other",
    [
        Gemma2RMSNorm(48),
        HalfRMSNorm(48),
        GatedRMSNorm(48),
        BiasedRMSNorm(48),
        nn.LayerNorm(48, bias=False),
        LlamaRMSNorm(48).to("meta"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_computed_otherwise_is_left_alone(other: nn.Module) -> None:
    before = other.state_dict()
    assert lightened(other) == []
    assert "forward" not in vars(other) and other.state_dict().keys() == before.keys()


def test_the_trial_changes_nothing() -> None:
    model = tiny_model("qwen3")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.get_rng_state()
    names = lightened(model)
    assert torch.equal(state, torch.get_rng_state())
    layer = ["self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"]
    expected = [f"model.layers.{i}.{n}" for i in range(2) for n in layer]
    assert names == [*expected, "model.norm"]
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
