"""The RMSNorms (Zhang & Sennrich 2019, arXiv 1910.07467) of a frozen base, as training
computes them.

transformers' own keep float32 copies of their input for the backward pass; these keep the
input as it is and one number a row. The values have the same bits: a module for which a trial
shows others (Gemma's, which scale by 1 + weight) is left alone. No gradient of the weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from astuner.engine.embedded.packed import in_chunks


class _Norm(torch.autograd.Function):
    """y = weight * x / sqrt(mean(x^2) + eps), with a gradient of x."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        output, scale = _compute(inputs, weight_D, eps)
        ctx.save_for_backward(inputs, weight_D, scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None, None]:
        """With n = x * scale and d = gradient * weight: scale * (d - n * mean(d * n))."""
        inputs, weight_D, scale = ctx.saved_tensors
        d_inputs = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
        chunks = in_chunks(gradient, inputs, scale, d_inputs)
        for gradient_ND, x_ND, scale_N1, out_ND in chunks:
            n_ND = x_ND.to(torch.float32, copy=True).mul_(scale_N1)
            d_ND = gradient_ND.to(torch.float32, copy=True).mul_(weight_D)
            inner_N1 = (d_ND * n_ND).mean(-1, keepdim=True)
            out_ND.copy_(d_ND.addcmul_(n_ND, inner_N1, value=-1).mul_(scale_N1))
        return d_inputs, None, None


def _compute(inputs: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The output, and float32 [..., 1] by which the inputs are scaled."""
    x = inputs.float()
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * (x * scale).to(inputs.dtype), scale


# ---------------------------------------------------------------- which norms


def lightened(model: nn.Module) -> list[str]:
    """The names of the model's norms that from now on are computed by these."""
    dtype = next(model.parameters()).dtype
    changed: list[str] = []
    for name, module in model.named_modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if isinstance(eps, float) and _is_norm(module) and _has_same_bits(module, eps, dtype):
            vars(module)["forward"] = partial(_of, module, module.forward, eps)
            changed.append(name)
    return changed


def _of(module: nn.Module, plain: Callable[[Tensor], Tensor], eps: float, inputs: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and inputs.requires_grad) or module.weight.requires_grad:
        return plain(inputs)
    return _Norm.apply(inputs, module.weight, eps)  # pyright: ignore[reportReturnType]


def _is_norm(module: nn.Module) -> bool:
    """Whether it looks like one: it takes one tensor, and has a weight on some device."""
    weights = dict(module.named_parameters())
    return (
        type(module).__name__.endswith("RMSNorm")
        and len(inspect.signature(module.forward).parameters) == 1
        and list(weights) == ["weight"]
        and weights["weight"].ndim == 1
        and not weights["weight"].is_meta
    )


@torch.no_grad()
def _has_same_bits(module: nn.Module, eps: float, dtype: torch.dtype) -> bool:
    """With inputs from small to large, and a weight that is not the ones or zeros of a new
    model."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 16, len(weight), generator=generator)
    inputs = inputs.mul_(torch.logspace(-4, 2, 16)[:, None]).to(weight.device, dtype)
    trial = torch.randn(len(weight), generator=generator).to(weight)
    theirs: Any = functional_call(module, {"weight": trial}, (inputs,))
    return isinstance(theirs, Tensor) and torch.equal(theirs, _compute(inputs, trial, eps)[0])
