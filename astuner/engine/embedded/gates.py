"""The gated MLPs (Shazeer 2020, arXiv 2002.05202) of a model, as training computes them.

transformers' own keep the activation beside what it is computed from, which is as much as a
layer's attention keeps; here the backward pass computes it again. Values and gradients have
the same bits. Modules that compute anything else than down(act(gate(x)) * up(x)) are left alone.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from astuner.engine.embedded.packed import in_chunks

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class _Gate(torch.autograd.Function):
    """act(gate) * up, where each row of act is of its own."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: nn.Module) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = (torch.empty(gate.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        chunks = in_chunks(gradient, gate, up, d_gate, d_up)
        for gradient_NI, gate_NI, up_NI, d_gate_NI, d_up_NI in chunks:
            with torch.enable_grad():
                leaf: Any = gate_NI.detach().requires_grad_()
                act_NI = ctx.act(leaf)
            torch.mul(gradient_NI, act_NI.detach(), out=d_up_NI)
            act_NI.backward(gradient_NI * up_NI)
            d_gate_NI.copy_(leaf.grad)
        return d_gate, d_up, None


# ---------------------------------------------------------------- which modules


def gated(model: nn.Module) -> list[str]:
    """The names of the modules that from now on are computed so."""
    changed: list[str] = []
    for name, module in model.named_modules():
        if {n for n, _ in module.named_children()} == PARTS and _is_gated(module):
            vars(module)["forward"] = partial(_of, module)
            changed.append(name)
    return changed


def _of(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if torch.is_grad_enabled():
        return module.down_proj(_Gate.apply(gate, up, module.act_fn))
    return module.down_proj(module.act_fn(gate) * up)


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    """Whether its forward pass does just that, in a trial where small products stand for the
    layers. One that asks for anything else of its module does more."""
    if "forward" in vars(module) or next(module.act_fn.parameters(), None) is not None:
        return False
    x, gate, up, down = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    stand_in: Any = SimpleNamespace(
        gate_proj=partial(F.linear, weight=gate),
        up_proj=partial(F.linear, weight=up),
        down_proj=partial(F.linear, weight=down),
        act_fn=module.act_fn,
    )
    try:
        theirs: Any = type(module).forward(stand_in, x[None])
    except (AttributeError, TypeError):
        return False
    return isinstance(theirs, Tensor) and torch.equal(theirs, _of(stand_in, x[None]))
