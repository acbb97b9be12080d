"""LoRA adapters on one frozen base model: any number in memory, one of them active, or each
on its own tokens of a pass that samples.

An adapter (Hu et al. 2021, arXiv 2106.09685) is one flat buffer in the base's dtype,
seen as the matrices A and B of the layers it targets. The base's layers add the active
one's term to their outputs (see `linears`), so that making another adapter active sets
references, and ranks and targets may differ. No optimizer, no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from astuner.engine.embedded.gates import gated
from astuner.engine.embedded.linears import Group, Lora, grouped, is_linear
from astuner.engine.embedded.norms import lightened
from astuner.engine.embedded.together import Term, bundles
from astuner.engine.protocol import LoraSpec
from astuner.errors import ModelError

PARTS = ("attn", "mlp", "unembed")


@dataclass(frozen=True, slots=True)
class Target:
    """A layer that an adapter changes."""

    name: str
    """Its path in the model."""
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """All that two adapters have to share for one's weights to fit the other."""

    rank: int
    alpha: float
    targets: tuple[Target, ...]
    """In the order of the model's modules."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def size(self) -> int:
        """How many numbers an adapter has."""
        return sum(self.rank * (t.inputs + t.outputs) for t in self.targets)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """`flat` [size] as named matrices: A [rank, inputs] and B [outputs, rank] of each
        target, in order."""
        matrices: dict[str, Tensor] = {}
        start = 0
        for target in self.targets:
            for name, rows, columns in (
                (name_of_a(target.name), self.rank, target.inputs),
                (name_of_b(target.name), target.outputs, self.rank),
            ):
                matrices[name] = flat[start : start + rows * columns].view(rows, columns)
                start += rows * columns
        return matrices


def name_of_a(layer: str) -> str:
    return f"{layer}.lora_A.weight"


def name_of_b(layer: str) -> str:
    return f"{layer}.lora_B.weight"


class Adapter:
    """The weights of one adapter. They can be moved; the parameters stay the same objects."""

    def __init__(self, shape: AdapterShape, flat: Tensor, *, trainable: bool) -> None:
        self.shape = shape
        self.flat = flat
        """[shape.size]; the parameters are views of it."""
        self.parameters: dict[str, nn.Parameter] = {
            name: nn.Parameter(view, requires_grad=trainable)
            for name, view in shape.views(flat).items()
        }

    def copy(self) -> Adapter:
        """The weights as they are now, not trainable."""
        return Adapter(self.shape, self.flat.clone(), trainable=False)

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes

    @torch.inference_mode(mode=False)
    def move(self, device: torch.device) -> None:
        """Keep the weights on `device` from now on."""
        self.flat = self.flat.to(device)
        views = self.shape.views(self.flat)
        for name, parameter in self.parameters.items():
            parameter.data = views[name]


class LoraLayers:
    """The layers of a base model on which adapters are laid."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)
        self._layers: Mapping[str, nn.Module] = {
            name: module for name, module in model.named_modules() if is_linear(module)
        }
        head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = next((n for n, module in self._layers.items() if module is head), "")
        first = next(model.parameters())
        self.device: torch.device = first.device
        self.dtype: torch.dtype = first.dtype
        self.recomputing: Sequence[nn.Module] = ()
        """Layers that, in training, recompute their activations instead of keeping them."""
        self._groups = grouped(model)
        gated(model)
        lightened(model)
        self._places: dict[str, tuple[Group, int]] = {
            name: (group, index) for group in self._groups for index, name in enumerate(group.names)
        }
        self._active: Adapter | None = None
        self._each = False
        """Whether adapters are active on tokens of their own instead."""
        self._training = False

    # ------------------------------------------------------------ adapters

    def new(self, spec: LoraSpec, seed: int) -> Adapter:
        """A trainable adapter that changes nothing yet: A drawn from `seed` exactly as PEFT
        draws it, B zero. Raises ModelError when the spec does not fit the model."""
        shape = self.shape(spec)
        flat = torch.zeros(shape.size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            matrices = shape.views(flat)
            for target in shape.targets:
                _draw(matrices[name_of_a(target.name)], target)
        return Adapter(shape, flat.to(self.device, self.dtype), trainable=True)

    def shape(self, spec: LoraSpec) -> AdapterShape:
        """Of an adapter as `spec` wants it. Raises ModelError."""
        if spec.rank < 1:
            raise ModelError(f"The rank of a LoRA adapter must be at least 1; it is {spec.rank}.")
        return self.shape_of(spec.rank, spec.alpha, self._chosen(spec.target_modules))

    def shape_of(self, rank: int, alpha: float, names: Sequence[str]) -> AdapterShape:
        """Of an adapter on the layers of these paths, all of which must exist."""
        chosen = set(names)
        targets = tuple(Target(n, *_sizes(m)) for n, m in self._layers.items() if n in chosen)
        return AdapterShape(rank, alpha, targets)

    def has(self, layer: str) -> bool:
        return layer in self._layers

    def is_transposed(self, shape: AdapterShape) -> bool:
        """Whether the targets store their weights [inputs, outputs], as GPT-2's do."""
        return any(isinstance(self._layers[t.name], Conv1D) for t in shape.targets)

    def _chosen(self, wanted: str | Sequence[str]) -> list[str]:
        names = wanted.split(",") if isinstance(wanted, str) else wanted
        chosen: list[str] = []
        for name in (n.strip() for n in names):
            found = [layer for layer in self._layers if self._matches(layer, name)]
            if not found:
                kinds = sorted({layer.rsplit(".", 1)[-1] for layer in self._layers})
                raise ModelError(
                    f"model.lora.target_modules does not fit the model: it has no linear layer "
                    f"{name!r}. Use names of {kinds}, of the parts {list(PARTS)}, or all-linear."
                )
            chosen += found
        return chosen

    def _matches(self, layer: str, wanted: str) -> bool:
        if wanted == "all-linear":
            return self._part(layer) != "unembed"
        if wanted in PARTS:
            return self._part(layer) == wanted
        return layer == wanted or layer.endswith(f".{wanted}")

    def _part(self, layer: str) -> str:
        if layer == self._head:
            return "unembed"
        names = layer.lower().split(".")
        return "attn" if any("attn" in name or "attention" in name for name in names) else "mlp"

    # ------------------------------------------------------------ the active one

    def activate(self, adapter: Adapter | None, *, training: bool = False) -> nn.Module:
        """The model, from now on with this adapter, or as it is without any."""
        if training != self._training:
            self._training = training
            for layer in self.recomputing:
                layer.training = training
        for group in self._groups:
            group.drop()
        if self._each or adapter is not self._active:
            for group in self._groups:
                group.clear()
            if adapter is not None:
                for group, matrices in self._by_group(adapter).items():
                    group.lora = Lora(matrices, adapter.shape.scale)
            self._active, self._each = adapter, False
        return self.model

    def activate_each(self, spans: Sequence[tuple[Adapter | None, int]]) -> nn.Module:
        """The model for one packed row without gradients: runs of tokens with the adapter of
        each, or without any."""
        self.activate(None)
        self._each = True
        for bundle in bundles(spans, lambda adapter: adapter.shape, self.device):
            shape = bundle.adapters[0].shape
            matrices = iter(zip(*(a.parameters.values() for a in bundle.adapters), strict=True))
            for target in shape.targets:
                group, index = self._places[target.name]
                term = Term(bundle, next(matrices), next(matrices), shape.scale)
                group.terms.append((index, term))
        return self.model

    def _by_group(self, adapter: Adapter) -> Mapping[Group, Mapping[int, tuple[Tensor, Tensor]]]:
        by_group: dict[Group, dict[int, tuple[Tensor, Tensor]]] = {}
        matrices = iter(adapter.parameters.values())
        for target in adapter.shape.targets:
            group, index = self._places[target.name]
            by_group.setdefault(group, {})[index] = next(matrices), next(matrices)
        return by_group

    def forget(self, adapter: Adapter) -> None:
        """Hold no reference to it any more."""
        if self._each or adapter is self._active:
            self.activate(None)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    assert isinstance(layer.weight, Tensor)
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


def _draw(a: Tensor, target: Target) -> None:
    """PEFT makes two linear layers, which draw their own weights, before it draws A."""
    rank = a.shape[0]
    nn.Linear(target.inputs, rank, bias=False)
    nn.Linear(rank, target.outputs, bias=False)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
