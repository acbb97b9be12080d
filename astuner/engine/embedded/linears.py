"""The linear layers of a frozen base, as sampling and training compute them.

Layers that get the same input (q, k and v; gate and up) are one product, and the term of a
LoRA adapter (Hu et al. 2021, arXiv 2106.09685) is added within it. On CPU the weights are
packed once in the layout of oneDNN's kernels: packing them anew in each product takes up to
as long as the product of the few tokens that are decoded at a time. This copy of the weights
stands beside the model's own, whose modules keep their names. No adapters by name, no optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from astuner.engine.embedded.together import Term

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What transformers calls layers of one parent that get the same input. In a model that gives
them different ones the results are the same, and slower."""
DECODED = 64
"""Tokens of a product for which weights are packed; oneDNN lays them out alike for others."""


@dataclass(frozen=True, slots=True)
class Lora:
    """What one adapter adds to a group."""

    matrices: Mapping[int, tuple[Tensor, Tensor]]
    """A [rank, I] and B [O, rank] of the layers that it changes, by their number."""
    scale: float


class Group:
    """Layers that are computed together: their weights stand side by side."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.names = tuple(layers)
        self._modules = list(layers.values())
        weights = [_weight(module) for module in self._modules]
        self.widths = tuple(len(weight) for weight in weights)
        self._weight_OI = _side_by_side(self._modules, weights)
        self.lora: Lora | None = None
        """Of the adapter that is active."""
        self.terms: list[tuple[int, Term[Any]]] = []
        """Instead: those of adapters on tokens of their own, with the layer's number."""
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}
        for index, module in enumerate(self._modules):
            vars(module)["forward"] = partial(self._of, index)
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """To be called when the weights have changed."""
        self._packed = _packed(self._weight_OI)
        self._bias_O = _biases(self._modules)

    def clear(self) -> None:
        """No adapter."""
        self.lora = None
        self.terms = []

    def drop(self) -> None:
        """What is left of a pass that broke off, and its graph."""
        self._input, self._outputs = None, {}

    def _of(self, index: int, inputs: Tensor) -> Tensor:
        """One layer's output; the first that gets an input computes it for all."""
        if inputs is not self._input or index not in self._outputs:
            self._input, self._outputs = inputs, dict(enumerate(self(inputs)))
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output

    def __call__(self, inputs: Tensor) -> Sequence[Tensor]:
        """[..., I] to [..., O] of each layer."""
        if self.terms:
            outputs = self.apart(self.base(inputs))
            for index, term in self.terms:
                term.add(inputs, outputs[index])
            return outputs
        matrices = [m for pair in self.lora.matrices.values() for m in pair] if self.lora else []
        if torch.is_grad_enabled():
            return _Product.apply(inputs, self, self.lora, *matrices)  # pyright: ignore[reportReturnType]
        return _compute(inputs, self, self.lora)[0]

    def base(self, inputs: Tensor) -> Tensor:
        """Of all layers, without any adapter; no gradient."""
        if self._packed is None:
            return F.linear(inputs, self._weight_OI, self._bias_O)
        return torch.ops.mkldnn._linear_pointwise(
            inputs, self._packed, self._bias_O, "none", [], ""
        )

    def apart(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Each layer's own. SiLU has other bits, and takes longer, on memory with gaps."""
        return tuple(part.contiguous() for part in outputs.split(self.widths, -1))

    def of_gradients(self, gradients_NO: Sequence[Tensor]) -> Tensor:
        """[N, I] of the outputs' [N, O]."""
        weights = self._weight_OI.split(self.widths)
        total = gradients_NO[0].mm(weights[0])
        for gradient, weight in zip(gradients_NO[1:], weights[1:], strict=True):
            total.addmm_(gradient, weight)
        return total


class _Product(torch.autograd.Function):
    """y = x W' + scale * x A' B' of each layer, with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, group: Group, lora: Lora | None, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, hidden = _compute(inputs, group, lora)
        ctx.save_for_backward(inputs, *hidden, *matrices)
        ctx.group, ctx.lora = group, lora
        return outputs

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        lora: Lora | None = ctx.lora
        inputs, *saved = ctx.saved_tensors
        by_layer = [_rows(gradient) for gradient in gradients]
        d_inputs = ctx.group.of_gradients(by_layer) if ctx.needs_input_grad[0] else None
        d_matrices: list[Tensor] = []
        if lora and lora.matrices:
            changed, count = [by_layer[i] for i in lora.matrices], len(lora.matrices)
            hiddens, a, b = saved[:count], saved[count::2], saved[count + 1 :: 2]
            parts = [gradient.mm(matrix) for gradient, matrix in zip(changed, b, strict=True)]
            d_hidden = torch.cat(parts, 1).mul_(lora.scale)
            if d_inputs is not None:
                d_inputs.addmm_(d_hidden, torch.cat(a))
            d_a = d_hidden.t().mm(_rows(inputs)).split([len(matrix) for matrix in a])
            for of_a, hidden, gradient in zip(d_a, hiddens, changed, strict=True):
                d_matrices += of_a, _rows(hidden).t().mm(gradient).t()
        d_inputs = None if d_inputs is None else d_inputs.view(inputs.shape)
        return d_inputs, None, None, *d_matrices


def _compute(
    inputs: Tensor, group: Group, lora: Lora | None
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The outputs, and scale * A input of each layer that the adapter changes: that is scaled
    rather than the output, as each pass over an output counts."""
    output = group.base(inputs)
    if lora is None:
        return group.apart(output), []
    outputs, hiddens = list(output.split(group.widths, -1)), list[Tensor]()
    for index, part in enumerate(outputs):
        if index not in lora.matrices:
            outputs[index] = part.contiguous()
            continue
        a, b = lora.matrices[index]
        hiddens.append(F.linear(inputs, a).mul_(lora.scale))
        term = F.linear(hiddens[-1], b)
        outputs[index] = part.add_(term) if part.is_contiguous() else part + term
    return tuple(outputs), hiddens


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# ---------------------------------------------------------------- weights


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a plain linear layer; some routers and quantised layers are more."""
    return type(layer).forward in (nn.Linear.forward, Conv1D.forward)


def grouped(model: nn.Module) -> list[Group]:
    """All linear layers of the model, which from now on are computed by these groups."""
    groups: list[Group] = []
    for path, parent in model.named_modules():
        layers = {n: m for n, m in parent.named_children() if is_linear(m)}
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
    """A copy in oneDNN's layout; None where it has no such kernels: on another device, or in a
    dtype that this CPU does not know."""
    if weight_OI.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(weight_OI, DECODED)
    except RuntimeError as error:
        if "needs the cpu support" not in str(error):
            raise
        return None
