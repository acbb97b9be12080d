"""The linear layers of a frozen base, as sampling and training compute them.

Layers that get the same input (q, k and v; gate and up) are one product, and the term of a
LoRA adapter (Hu et al. 2021, arXiv 2106.09685) is added within it. On CPU the weights are
packed once in the layout of oneDNN's kernels: packing them anew in each product takes up to
as long as the product of the few tokens that are decoded at a time. The model's modules keep
their names, and their weights, which become views. No adapters by name, no optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from astuner.engine.embedded.together import Term

LINEAR = (nn.Linear, Conv1D)
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What transformers calls layers of one parent that get the same input. In a model that gives
them different ones the results are the same, and slower."""
DECODED = 64
"""Tokens of a product for which weights are packed; oneDNN lays them out alike for others."""


class Group:
    """Layers that are computed together: their outputs stand side by side."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.names = tuple(layers)
        modules = list(layers.values())
        weights = [_weight(module) for module in modules]
        self.widths = tuple(len(weight) for weight in weights)
        self._modules = modules
        self._weight_OI = _side_by_side(modules, weights)
        self.factors: Factors | None = None
        """Of the adapter that is active."""
        self.terms: list[Term[Any]] = []
        """Instead: those of adapters on tokens of their own."""
        self._input: Tensor | None = None
        self._outputs: Sequence[Tensor] = ()
        for index, module in enumerate(modules):
            vars(module)["forward"] = partial(self._of, index)
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """To be called when the weights have changed."""
        self._packed = _packed(self._weight_OI)
        self._bias_O = _biases(self._modules)

    def clear(self) -> None:
        """No adapter."""
        self.factors = None
        self.terms = []

    def _of(self, index: int, inputs: Tensor) -> Tensor:
        """One layer's output; the first that gets an input computes it for all."""
        if not self._outputs or inputs is not self._input:
            self._input, self._outputs = inputs, self(inputs)
        output = self._outputs[index]
        if index == len(self.widths) - 1:
            self._input, self._outputs = None, ()
        return output

    def __call__(self, inputs: Tensor) -> Sequence[Tensor]:
        """[..., I] to [..., O] of each layer."""
        if self.factors is not None:
            return _product(inputs, self, *self.factors.joined())
        if not self.terms:
            return _product(inputs, self, None, None)
        output = self.base(inputs)
        for term in self.terms:
            term.add(inputs, output)
        return _apart(output, self)

    def base(self, inputs: Tensor) -> Tensor:
        """Without any adapter; no gradient."""
        if self._packed is None:
            return F.linear(inputs, self._weight_OI, self._bias_O)
        return torch.ops.mkldnn._linear_pointwise(
            inputs, self._packed, self._bias_O, "none", [], ""
        )

    def of_gradients(self, gradients_NO: Sequence[Tensor]) -> Tensor:
        """[N, I] of the outputs' [N, O]."""
        return _sum_of_products(gradients_NO, self._weight_OI.split(self.widths))


class Factors:
    """scale * A, and B, of the layers of a group that an adapter changes, by their number."""

    def __init__(
        self,
        group: Group,
        by_index: Mapping[int, tuple[Tensor, Tensor]],
        scale: float,
        *,
        constant: bool,
    ) -> None:
        self.group = group
        self._by_index = by_index
        self._scale = scale
        self._constant = constant
        self._kept: tuple[Tensor, Tensor] | None = None

    def joined(self) -> tuple[Tensor, Tensor]:
        """scale * A [R, I] and B [O, R] of the group, R the ranks of all; B is 0 where one
        layer's outputs meet another's ranks. Made once if they are constant."""
        if self._kept is not None:
            return self._kept
        a = torch.cat([a for a, _ in self._by_index.values()]) * self._scale
        absent = ((a, a.new_zeros(width, 0)) for width in self.group.widths)
        pairs = [self._by_index.get(index, none) for index, none in enumerate(absent)]
        joined = a, torch.block_diag(*(b for _, b in pairs))
        if self._constant:
            self._kept = joined
        return joined


class _Product(torch.autograd.Function):
    """y = x W' + x A' B' of each layer, with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, group: Group, a: Tensor | None, b: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs, hidden = _compute(inputs, group, a, b)
        ctx.save_for_backward(inputs, hidden, a, b)
        ctx.group = group
        return outputs

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        inputs, hidden, a, b = ctx.saved_tensors
        by_layer = [_rows(gradient) for gradient in gradients]
        d_inputs = d_a = d_b = None
        if ctx.needs_input_grad[0]:
            d_inputs = ctx.group.of_gradients(by_layer)
        if a is not None:
            d_hidden = _sum_of_products(by_layer, b.split(ctx.group.widths))
            if d_inputs is not None:
                d_inputs.addmm_(d_hidden, a)
            if ctx.needs_input_grad[2]:
                d_a = d_hidden.t().mm(_rows(inputs))
                d_b = torch.cat([gradient.t().mm(_rows(hidden)) for gradient in by_layer])
        d_inputs = None if d_inputs is None else d_inputs.view(inputs.shape)
        return d_inputs, None, d_a, d_b


def _product(inputs: Tensor, group: Group, a: Tensor | None, b: Tensor | None) -> Sequence[Tensor]:
    if torch.is_grad_enabled():
        return _Product.apply(inputs, group, a, b)  # pyright: ignore[reportReturnType]
    return _compute(inputs, group, a, b)[0]


def _compute(
    inputs: Tensor, group: Group, a: Tensor | None, b: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The outputs, and the A input."""
    output = group.base(inputs)
    if a is None or b is None:
        return _apart(output, group), None
    hidden = F.linear(inputs, a)
    term = F.linear(hidden, b)
    if len(group.widths) == 1:
        return (output.add_(term),), hidden
    both = zip(output.split(group.widths, -1), term.split(group.widths, -1), strict=True)
    return tuple(one + other for one, other in both), hidden


def _apart(output: Tensor, group: Group) -> tuple[Tensor, ...]:
    """Each layer's own, one token after the other as above: SiLU has other bits, and takes
    twice as long, where there are gaps."""
    return tuple(part.contiguous() for part in output.split(group.widths, -1))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _sum_of_products(parts: Sequence[Tensor], matrices: Sequence[Tensor]) -> Tensor:
    total = parts[0].mm(matrices[0])
    for part, matrix in zip(parts[1:], matrices[1:], strict=True):
        total.addmm_(part, matrix)
    return total


# ---------------------------------------------------------------- weights


def grouped(model: nn.Module) -> list[Group]:
    """All linear layers of the model, which from now on are computed by these groups."""
    groups: list[Group] = []
    for path, parent in model.named_modules():
        layers = {n: m for n, m in parent.named_children() if isinstance(m, LINEAR)}
        for names in _together(layers):
            groups.append(Group({f"{path}.{n}".lstrip("."): layers[n] for n in names}))
    return groups


def _together(layers: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    siblings = [names for names in SIBLINGS if _alike([layers.get(name) for name in names])]
    taken = {name for names in siblings for name in names}
    return [*siblings, *((name,) for name in layers if name not in taken)]


def _alike(layers: Sequence[nn.Module | None]) -> bool:
    found = [layer for layer in layers if isinstance(layer, nn.Linear)]
    kinds = {(x.in_features, _biases([x]) is None) for x in found}
    return len(found) == len(layers) and len(kinds) == 1


def _weight(layer: nn.Module) -> Tensor:
    """[outputs, inputs]"""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().t() if isinstance(layer, Conv1D) else layer.weight.detach()


def _side_by_side(layers: Sequence[nn.Module], weights: Sequence[Tensor]) -> Tensor:
    """One tensor [O, I] that the layers' own weights are views of."""
    if len(layers) == 1:
        return weights[0]
    joined = torch.cat(list(weights))
    for layer, part in zip(layers, joined.split([len(w) for w in weights]), strict=True):
        assert isinstance(layer, nn.Linear)
        layer.weight.data = part
    return joined


def _biases(layers: Sequence[nn.Module]) -> Tensor | None:
    given = [layer.bias.detach() for layer in layers if isinstance(layer.bias, Tensor)]
    return torch.cat(given) if given else None


def _packed(weight_OI: Tensor) -> Tensor | None:
    """None where there are no such kernels: on another device, for this dtype, or on this CPU."""
    if weight_OI.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight_OI, DECODED)
    except RuntimeError:  # what it says: "bf16 path needs the cpu support ..."
        return None
