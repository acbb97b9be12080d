"""A model whose weights are trained elsewhere: one copy, which samples.

`open_received` gives an `EmbeddedModel` whose `load` takes a file that
`write_weights` wrote, all weights at once, between two ticks of the sampler; the
prefix cache is dropped and the version is the file's. It cannot train.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from astuner.engine.embedded.device_thread import Steps
from astuner.engine.embedded.linears import grouped
from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.embedded.weights import State, Weights, load_transformers
from astuner.engine.protocol import AdamParams, ForwardBackwardResult, LossSpec
from astuner.errors import EngineError
from astuner.types import Sample


def open_received(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_context: int = 0,
    max_num_seqs: int = 128,
    kv_cache_tokens: int = 0,
) -> EmbeddedModel:
    """Load the transformers folder `path`, whose weights sample until others are received.

    The arguments are those of `EmbeddedModel.open`. Raises ModelError.
    """

    def build() -> tuple[Weights, Receiver]:
        model, config, tokenizer = load_transformers(path, device=device, dtype=dtype)
        states = _OneState(model)
        weights = Weights(states, path=Path(path), lora=None, config=config, tokenizer=tokenizer)
        return weights, Receiver(weights)

    return EmbeddedModel(
        build,
        max_context=max_context,
        max_num_seqs=max_num_seqs,
        kv_cache_tokens=kv_cache_tokens,
    )


def write_weights(path: Path, tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
    """Write named tensors for `load`; returns how many bytes they have.

    They may still change afterwards: the file has copies.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in tensors}
    torch.save({"version": version, "weights": weights}, path)
    return sum(tensor.nbytes for tensor in weights.values())


def read_weights(path: Path) -> tuple[dict[str, Tensor], int]:
    """What `write_weights` wrote: tensors that lie in the mapped file, and the version."""
    content = torch.load(path, mmap=True, weights_only=True)
    return content["weights"], content["version"]


class Receiver:
    """The training verbs of a model that only follows."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        # Tied weights have two names, and a trainer may send either or both.
        self._places: dict[str, Tensor] = weights.states.select("published").state_dict()
        self._needed = {p.data_ptr(): name for name, p in weights.states.trained().items()}

    @torch.no_grad()
    def load(self, path: Path, *, optimizer: bool) -> None:
        """Replace all weights. Raises EngineError, with the old ones still in place, when
        the file's names or shapes are not those of the model."""
        if optimizer:
            _refuse()
        tensors, version = read_weights(path)
        self._check(tensors)
        for name, tensor in tensors.items():
            self._places[name].copy_(tensor)
        self._weights.states.publish()
        self._weights.version = version

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        known = {name: self._places[name] for name in tensors if name in self._places}
        here = {place.data_ptr() for place in known.values()}
        problems = {
            "unknown": [name for name in tensors if name not in known],
            "missing": [name for pointer, name in self._needed.items() if pointer not in here],
            "of another shape": [n for n, p in known.items() if p.shape != tensors[n].shape],
        }
        for what, names in problems.items():
            if names:
                raise EngineError(
                    f"The weights received are not those of the model in {self._weights.path}: "
                    f"{len(names)} {what}, e.g. {', '.join(names[:3])}. Trainer and sampler must "
                    "load the same model; LoRA weights have to be merged before they are sent."
                )

    def forward(
        self, samples: Sequence[Sample], *, temperature: float
    ) -> Steps[tuple[NDArray[np.float32], ...]]:
        _refuse()

    def forward_backward(
        self, samples: Sequence[Sample], loss: LossSpec
    ) -> Steps[ForwardBackwardResult]:
        _refuse()

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        _refuse()

    def save(self, path: Path, *, optimizer: bool) -> None:
        _refuse()


def _refuse() -> NoReturn:
    raise EngineError("This model's weights are trained elsewhere; it only samples.")


class _OneState:
    """One model, whatever state is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.requires_grad_(False)
        self._groups = grouped(model)

    def select(self, state: State) -> nn.Module:
        return self._model

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters())

    def publish(self) -> None:
        """What was received is what samples."""
        for group in self._groups:
            group.pack()

    def checkpoint_activations(self) -> None:
        _refuse()

    def save(self, folder: Path, masters: Mapping[str, Any]) -> None:
        _refuse()
