"""The model's weights in their three states: trained, published and reference.

With LoRA (Hu et al. 2021, arXiv 2106.09685) one frozen base carries two adapters,
and the reference is the base alone; with full weights there are two whole models,
and the reference is read again from disk when first asked for. Each state is a
context that yields the transformers model to call. Everything here runs on the
device thread. The fp32 masters and the optimizer are in `masters`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from astuner.engine.embedded.adapters import Adapter, LoraLayers
from astuner.engine.embedded.compatible import (
    check_config,
    check_model,
    choose_device,
    choose_dtype,
    context_length,
)
from astuner.engine.embedded.packed import ATTENTION
from astuner.engine.embedded.peft_format import write_adapter
from astuner.engine.embedded.steps import Spans
from astuner.engine.protocol import LoraSpec
from astuner.errors import ModelError

State = Literal["trained", "published", "reference"]


class States(Protocol):
    """LoRA or full weights: what differs between the two."""

    def select(self, state: State) -> nn.Module:
        """The transformers model, with the weights of this state active."""
        ...

    def trained(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, in a fixed order."""
        ...

    def publish(self) -> None:
        """Copy the trained weights over the published ones."""
        ...

    def checkpoint_activations(self) -> None:
        """From now on, trade time for memory while training."""
        ...

    def save(self, folder: Path, masters: Mapping[str, Tensor]) -> None:
        """Write the trained weights in the form other tools load."""
        ...


class LoadedModel:
    """What is known of a model once it is loaded."""

    def __init__(self, config: Any, tokenizer: Any, parameter: Tensor) -> None:
        self.tokenizer = tokenizer
        self.device: torch.device = parameter.device
        self.dtype: torch.dtype = parameter.dtype
        heads: int = config.num_attention_heads
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.vocab_size: int = config.vocab_size
        self.max_context: int = context_length(config)


class Weights(LoadedModel):
    """A loaded model and its states. `version` counts what has been published."""

    def __init__(
        self, states: States, *, path: Path, lora: LoraSpec | None, config: Any, tokenizer: Any
    ) -> None:
        super().__init__(config, tokenizer, next(iter(states.trained().values())))
        self.path = path
        self.lora = lora
        self.states = states
        self.version = 0
        self._entered: list[State] = []

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        lora: LoraSpec | None,
        seed: int,
    ) -> Weights:
        """Load the transformers folder `path`; a new adapter is drawn from `seed`.

        Raises ModelError when it cannot be loaded, when its attention is not one that
        the packed plans compute, or when the adapter's target modules are not in it.
        """
        path = Path(path)
        model, config, tokenizer = load_transformers(path, device=device, dtype=dtype)
        states = _Full(model, path) if lora is None else _one_adapter(model, lora, path, seed)
        return cls(states, path=path, lora=lora, config=config, tokenizer=tokenizer)

    @contextmanager
    def sampling(self, spans: Spans = ()) -> Generator[nn.Module]:
        """The published weights, in inference mode; there are no others."""
        with torch.inference_mode(), self._selected("published") as model:
            yield model

    @contextmanager
    def training(self) -> Generator[nn.Module]:
        """The trained weights, with gradients."""
        with torch.enable_grad(), self._selected("trained") as model:
            yield model

    @contextmanager
    def reference(self) -> Generator[nn.Module]:
        """The weights before any training, without gradients."""
        with torch.no_grad(), self._selected("reference") as model:
            yield model

    def fits(self, names: Collection[str]) -> bool:
        return True

    def version_of(self, weights: str) -> int:
        return self.version

    def publish(self) -> int:
        """Copy the trained weights to those that sample; returns their new version."""
        self.states.publish()
        self.version += 1
        return self.version

    @contextmanager
    def _selected(self, state: State) -> Generator[nn.Module]:
        self._entered.append(state)
        try:
            yield self.states.select(state)
        finally:
            self._entered.pop()
            if self._entered:
                self.states.select(self._entered[-1])


def load_transformers(path: str | Path, *, device: str, dtype: str) -> tuple[nn.Module, Any, Any]:
    """The model in a transformers folder, in eval mode, its text config and its tokenizer.

    Raises ModelError when they cannot be loaded or the packed plans cannot compute them.
    """
    where = choose_device(device)
    return _load(Path(path), where, choose_dtype(dtype, where))


def _load(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any, Any]:
    transformers_logging.disable_progress_bar()  # a second or less, and the run has its own
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
        check_config(config, path)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=ATTENTION, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"transformers cannot load the model in {path}: {error}") from error
    check_model(model, path)
    return model.eval().to(device), config, tokenizer


class LoraStates:
    """A trainable adapter, and a copy of it that samples, on one frozen base."""

    def __init__(self, layers: LoraLayers, adapter: Adapter, path: Path) -> None:
        self.layers = layers
        self.adapter = adapter
        self._path = path
        self._published: Adapter | None = None

    def select(self, state: State) -> nn.Module:
        chosen = {"trained": self.adapter, "published": self._published, "reference": None}[state]
        return self.layers.activate(chosen, training=state == "trained")

    def trained(self) -> dict[str, nn.Parameter]:
        return self.adapter.parameters

    def publish(self) -> None:
        if self._published is None:
            self._published = self.adapter.copy()
        else:
            self._published.flat.copy_(self.adapter.flat)

    def checkpoint_activations(self) -> None:
        self.layers.recomputing = recomputing_layers(self.layers.model)

    def save(self, folder: Path, masters: Mapping[str, Tensor]) -> None:
        """PEFT's files, with the fp32 masters as values."""
        shape = self.adapter.shape
        transposed = self.layers.is_transposed(shape)
        write_adapter(folder, shape, masters, base=self._path, transposed=transposed)


def _one_adapter(model: nn.Module, spec: LoraSpec, path: Path, seed: int) -> LoraStates:
    layers = LoraLayers(model)
    states = LoraStates(layers, layers.new(spec, seed), path)
    states.publish()
    return states


class _Full:
    """Two whole models; a third, the reference, only once it is asked for."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        self._models: dict[State, nn.Module] = {
            "trained": model,
            "published": copy.deepcopy(model).requires_grad_(False),
        }
        self._path = path

    def select(self, state: State) -> nn.Module:
        if state not in self._models:
            first = next(self._models["trained"].parameters())
            model, _, _ = _load(self._path, first.device, first.dtype)
            self._models[state] = model.requires_grad_(False)
        return self._models[state]

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self._models["trained"].named_parameters())

    @torch.no_grad()
    def publish(self) -> None:
        published: Mapping[str, nn.Parameter] = dict(self._models["published"].named_parameters())
        for name, source in self.trained().items():
            published[name].copy_(source)

    def checkpoint_activations(self) -> None:
        for layer in recomputing_layers(self._models["trained"]):
            layer.training = True

    def save(self, folder: Path, masters: Mapping[str, Tensor]) -> None:
        """A transformers folder in the compute dtype; the masters go to the optimizer's file."""
        model: Any = self._models["trained"]
        model.save_pretrained(folder)


def recomputing_layers(model: nn.Module) -> list[nn.Module]:
    """The layers, prepared so that they recompute their activations while `training` is
    set on them (on them alone: their dropouts stay off)."""
    layers: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for layer in layers:
        vars(layer).update(gradient_checkpointing=True, _gradient_checkpointing_func=recompute)
    return layers
