"""The adapters and snapshots on one base model, by name. Runs on the device thread.

Each adapter is a `Learner` of its own over the shared base, so that nothing one does
(gradients, moments, overflow) touches another. A snapshot is a copy of an adapter's
weights that never changes; it lives until its last hold is given back. The base
itself samples under the name "". Knows no requests and no users.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from astuner.engine.embedded import peft_format
from astuner.engine.embedded.adapters import Adapter, LoraLayers
from astuner.engine.embedded.checkpoint import whole_files
from astuner.engine.embedded.device_thread import Steps
from astuner.engine.embedded.learner import Learner
from astuner.engine.embedded.residency import Residency
from astuner.engine.embedded.steps import Spans
from astuner.engine.embedded.weights import LoadedModel, LoraStates, Weights
from astuner.engine.protocol import AdamParams, ForwardBackwardResult, LoraSpec, LossSpec
from astuner.errors import EngineError
from astuner.types import Sample

T = TypeVar("T")
BASE = ""
"""Names the base model among weights."""
SNAPSHOT = "snapshot-"
"""Begins the name of every snapshot, and of no adapter."""


@dataclass(eq=False)
class _Trained:
    """An adapter that is trained, and its optimizer."""

    name: str
    adapter: Adapter
    weights: Weights
    """`version` counts the steps taken."""
    learner: Learner
    latest: str = ""
    """The snapshot that is the adapter as it is now."""

    @property
    def nbytes(self) -> int:
        return self.adapter.nbytes + self.learner.nbytes

    def move(self, device: torch.device) -> None:
        self.adapter.move(device)
        self.learner.move(device)

    def changed(self) -> None:
        self.latest = ""


@dataclass(eq=False)
class _Snapshot:
    adapter: Adapter
    version: int
    holds: int = 1

    @property
    def nbytes(self) -> int:
        return self.adapter.nbytes

    def move(self, device: torch.device) -> None:
        self.adapter.move(device)


class AdapterBank(LoadedModel):
    """What a host computes with; also the weights that its scheduler samples under."""

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        tokenizer: Any,
        *,
        path: Path,
        make_learner: Callable[[Weights], Learner],
        budget: int,
    ) -> None:
        super().__init__(config, tokenizer, next(model.parameters()))
        self._config = config
        self._path = path
        self._layers = LoraLayers(model)
        self._make_learner = make_learner
        self.residency = Residency(self.device, budget)
        self.trained: dict[str, _Trained] = {}
        self.snapshots: dict[str, _Snapshot] = {}
        self._numbers = 0
        self.trained_tokens = 0
        """That went through a backward pass."""

    # ------------------------------------------------------------ sampling

    @contextmanager
    def sampling(self, spans: Spans = ()) -> Generator[nn.Module]:
        """The base, with each token's snapshot or none, in inference mode."""
        adapters = {name: self._ready(name) for name in dict.fromkeys(name for name, _ in spans)}
        with torch.inference_mode():
            if len(adapters) > 1:
                yield self._layers.activate_each([(adapters[n], count) for n, count in spans])
            else:
                yield self._layers.activate(next(iter(adapters.values()), None))

    def _ready(self, weights: str) -> Adapter | None:
        if weights == BASE:
            return None
        snapshot = self._snapshot(weights)
        self.residency.use(snapshot)
        return snapshot.adapter

    def fits(self, names: Collection[str]) -> bool:
        """Whether these snapshots can be on the device at once."""
        return self.residency.fits([self._snapshot(n) for n in names if n != BASE])

    def version_of(self, weights: str) -> int:
        """How many steps the adapter had taken; raises EngineError if there is no such
        snapshot."""
        return 0 if weights == BASE else self._snapshot(weights).version

    # ------------------------------------------------------------ training

    def create(self, name: str, spec: LoraSpec, seed: int) -> None:
        if name in self.trained:
            raise EngineError(f"There is an adapter {name!r} already; choose another name.")
        if name == BASE or name.startswith(SNAPSHOT):
            raise EngineError(f"{name!r} cannot name an adapter: snapshots are called like that.")
        adapter = self._layers.new(spec, seed)
        weights = Weights(
            LoraStates(self._layers, adapter, self._path),
            path=self._path,
            lora=spec,
            config=self._config,
            tokenizer=self.tokenizer,
        )
        trained = _Trained(name, adapter, weights, self._make_learner(weights))
        self.trained[name] = trained
        self.residency.use(trained)

    def adapter_size(self, spec: LoraSpec) -> int:
        """How many numbers such an adapter has. Changes nothing, so from any thread."""
        return self._layers.shape(spec).size

    def forward(
        self, name: str, samples: Sequence[Sample], temperature: float
    ) -> Steps[tuple[NDArray[np.float32], ...]]:
        trained = self._adapter(name)
        return self._steps(trained, trained.learner.forward(samples, temperature=temperature))

    def forward_backward(
        self, name: str, samples: Sequence[Sample], loss: LossSpec
    ) -> Steps[ForwardBackwardResult]:
        trained = self._adapter(name)
        steps = trained.learner.forward_backward(samples, loss)
        result = yield from self._steps(trained, steps)
        self.trained_tokens += int(result.metrics["trained_tokens"])
        return result

    def _steps(self, trained: _Trained, steps: Steps[T]) -> Steps[T]:
        """The same steps; before each the adapter is on the device."""
        try:
            while True:
                if self.trained.get(trained.name) is not trained:
                    raise _no_such("adapter", trained.name)
                self.residency.use(trained)
                try:
                    next(steps)
                except StopIteration as done:
                    return done.value
                yield
        finally:
            steps.close()

    def optim_step(self, name: str, params: AdamParams) -> dict[str, float]:
        trained = self._on_device(name)
        result = trained.learner.optim_step(params)
        if not result["skipped"]:
            trained.weights.version += 1
            trained.changed()
        return result

    def discard(self, name: str) -> None:
        self._adapter(name).learner.discard()

    # ------------------------------------------------------------ snapshots and files

    def snapshot(self, name: str) -> str:
        trained = self._on_device(name)
        if trained.latest in self.snapshots:
            self.snapshots[trained.latest].holds += 1
        else:
            trained.latest = self._keep(trained.adapter.copy(), trained.weights.version)
        return trained.latest

    def open_snapshot(self, path: Path) -> str:
        shape, values = peft_format.read_adapter(path, self._layers)
        adapter = Adapter(shape, torch.zeros(shape.size, dtype=self.dtype), trainable=False)
        for name, parameter in adapter.parameters.items():
            parameter.data.copy_(values[name])
        adapter.move(self.device)
        return self._keep(adapter, version=0)

    def _keep(self, adapter: Adapter, version: int) -> str:
        self._numbers += 1
        name = f"{SNAPSHOT}{self._numbers}"
        self.snapshots[name] = _Snapshot(adapter, version)
        self.residency.use(self.snapshots[name])
        return name

    def export(self, source: str, path: Path, *, optimizer: bool) -> None:
        if source in self.trained:
            self._on_device(source).learner.save(path, optimizer=optimizer)
            return
        snapshot = self._snapshot(source)
        if optimizer:
            raise EngineError(f"The snapshot {source!r} has no optimizer; export its adapter.")
        adapter = snapshot.adapter
        transposed = self._layers.is_transposed(adapter.shape)
        with whole_files(path) as scratch:
            peft_format.write_adapter(
                scratch, adapter.shape, adapter.parameters, base=self._path, transposed=transposed
            )

    def restore(self, name: str, path: Path, *, optimizer: bool) -> None:
        trained = self._on_device(name)
        trained.changed()
        trained.learner.restore(path, optimizer=optimizer)

    def release(self, name: str) -> bool:
        """Whether it is gone now."""
        if name in self.trained:
            trained = self.trained.pop(name)
            self._layers.forget(trained.adapter)
            self.residency.drop(trained)
            return True
        snapshot = self._snapshot(name)
        snapshot.holds -= 1
        if snapshot.holds:
            return False
        del self.snapshots[name]
        self._layers.forget(snapshot.adapter)
        self.residency.drop(snapshot)
        return True

    # ------------------------------------------------------------ names

    def _adapter(self, name: str) -> _Trained:
        if name not in self.trained:
            raise _no_such("adapter", name)
        return self.trained[name]

    def _on_device(self, name: str) -> _Trained:
        trained = self._adapter(name)
        self.residency.use(trained)
        return trained

    def _snapshot(self, name: str) -> _Snapshot:
        if name not in self.snapshots:
            raise _no_such("snapshot", name)
        return self.snapshots[name]


def _no_such(kind: str, name: str) -> EngineError:
    return EngineError(f"There is no {kind} {name!r}, or not any more: it was released.")
