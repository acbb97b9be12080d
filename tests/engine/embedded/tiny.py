"""Tiny random models, and stand-ins for the weights and the learner."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.embedded.packed import ATTENTION
from astuner.engine.embedded.steps import Spans
from astuner.engine.protocol import AdamParams, ForwardBackwardResult, LossSpec, SamplingParams

VOCAB = 97
_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    attention: str = ATTENTION,
    **shape: int,
) -> Any:
    """The same random weights every time, whatever the attention."""
    torch.manual_seed(0)
    config = (LlamaConfig if family == "llama" else Qwen3Config)(**{**_SHAPE, **shape})
    config._attn_implementation = attention
    model = (LlamaForCausalLM if family == "llama" else Qwen3ForCausalLM)(config)
    return model.to(dtype).eval()


class TinyWeights:
    """Publishing adds noise to the weights. In bfloat16 heads are wider: torch has other
    kernels for products of fewer than 4,096 multiplications, which no real model has."""

    def __init__(self, family: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        self.model = tiny_model(family, dtype, head_dim=32 if dtype == torch.bfloat16 else 8)
        config = self.model.config
        self.device, self.dtype, self.version = torch.device("cpu"), dtype, 0
        self.num_layers, self.num_kv_heads = config.num_hidden_layers, config.num_key_value_heads
        self.head_dim, self.vocab_size = config.head_dim, config.vocab_size
        self.max_context, self.tokenizer = config.max_position_embeddings, None
        self.forward_rows: list[int] = []
        self.model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: Any, args: Any, kwargs: Any) -> None:
        self.forward_rows.append(kwargs["input_ids"].shape[1])

    @contextmanager
    def sampling(self, spans: Spans = ()) -> Generator[Any, None, None]:
        with torch.inference_mode():
            yield self.model

    def fits(self, names: Collection[str]) -> bool:
        return True

    def version_of(self, weights: str) -> int:
        return self.version

    def publish(self) -> int:
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=0.1)
        self.version += 1
        return self.version


class TinyLearner:
    """Long verbs of three steps; "boom" as the loss raises in the second."""

    def __init__(self, weights: TinyWeights) -> None:
        self.weights = weights
        self.seen: list[str] = []

    def forward(self, samples: Sequence[Any], *, temperature: float) -> Generator[None, None, Any]:
        for _ in range(3):
            yield
        return tuple(np.zeros(2, np.float32) for _ in samples)

    def forward_backward(
        self, samples: Sequence[Any], loss: LossSpec
    ) -> Generator[None, None, ForwardBackwardResult]:
        for step in range(3):
            if loss.name == "boom" and step == 1:
                raise ValueError("boom in step 1")
            if loss.name == "oom" and step == 1:
                raise torch.OutOfMemoryError("tried to take 3 GiB")
            yield
        return ForwardBackwardResult(1.5, (), {"packed_tokens": 7.0})

    def optim_step(self, params: AdamParams) -> dict[str, float]:
        return {"grad_norm": 1.0, "lr": params.lr}

    def save(self, path: Path, *, optimizer: bool) -> None:
        self.seen.append(f"save {path} {optimizer}")

    def load(self, path: Path, *, optimizer: bool) -> None:
        self.seen.append(f"load {path} {optimizer}")
        self.weights.version = 7  # the saved one


class ManyWeights(TinyWeights):
    """Weights by name: each is the tiny model with noise of its own, so that no two fit into one
    pass. Records whose turn it was."""

    def __init__(self, names: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype=dtype)
        self.turns: list[str] = []
        self.fail_for = ""
        self._states: dict[str, dict[str, torch.Tensor]] = {}
        for number, name in enumerate(names):
            generator = torch.Generator().manual_seed(number)
            self._states[name] = {
                n: p + 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
                for n, p in self.model.state_dict().items()
            }

    def fits(self, names: Collection[str]) -> bool:
        return len(names) < 2

    @contextmanager
    def sampling(self, spans: Spans = ()) -> Generator[Any, None, None]:
        (weights,) = {name for name, _ in spans}
        self.turns.append(weights)
        if weights == self.fail_for:
            raise RuntimeError(f"no such luck with {weights}")
        with torch.inference_mode():
            self.model.load_state_dict(self._states[weights])
            yield self.model


def tiny_embedded(
    family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[EmbeddedModel, TinyWeights]:
    weights = TinyWeights(family, dtype)
    return EmbeddedModel(lambda: (weights, TinyLearner(weights)), **settings), weights


def slowed(model: torch.nn.Module, seconds: float = 0.01) -> None:
    """Every pass takes at least so long: hundreds of tokens leave time for what a test does
    meanwhile, however late its own thread is."""
    model.register_forward_pre_hook(lambda *_: time.sleep(seconds))


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def greedy(max_tokens: int = 8, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **fields)
