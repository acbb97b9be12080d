"""A host whose model fits on a line: every token is drawn from softmax(w), w an adapter's V
numbers. It trains, samples, saves and forgets for real, in microseconds and without torch.

Verbs can be held up (`gate`) and made to fail (`fail_next`), to try what the service does.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astuner.engine.protocol import (
    AdamParams,
    ForwardBackwardResult,
    HostStats,
    LoraSpec,
    LossSpec,
    SamplingParams,
    Scores,
    TokenChunk,
)
from astuner.errors import CheckpointError, EngineError
from astuner.types import Sample

VOCAB = 16
END = 0
Floats = NDArray[np.float32]


@dataclass
class Adapter:
    lora: LoraSpec
    weights: Floats = field(default_factory=lambda: np.zeros(VOCAB, np.float32))
    gradient: Floats = field(default_factory=lambda: np.zeros(VOCAB, np.float32))
    moment: Floats = field(default_factory=lambda: np.zeros(VOCAB, np.float32))
    steps: int = 0


class Tokenizer:
    """Token i is the i-th letter; 0 ends."""

    eos_token_id = END

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") + 1 for c in text]


class UnigramHost:
    """See `astuner.engine.protocol.AdapterHost`."""

    def __init__(self, max_context: int = 64) -> None:
        self.max_context = max_context
        self.tokenizer: Any = Tokenizer()
        self.adapters: dict[str, Adapter] = {}
        self.snapshots: dict[str, Floats] = {}
        self.opened: Counter[str] = Counter()
        """Every snapshot id -> how many hold it; 0 once released."""
        self.log: list[tuple[str, str]] = []
        """(verb, adapter), in the order they took effect."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail_next: Exception | None = None
        self.streams: list[tuple[str, str]] = []
        """(weights, tenant) of every stream."""
        self.doing, self.beat_age = "idle", 0.0
        self.running = 0
        self.peak = 0
        self._number = 0

    async def _turn(self, verb: str, adapter: str) -> Adapter:
        await self.gate.wait()
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self.log.append((verb, adapter))
        if adapter not in self.adapters:
            raise EngineError(f"There is no adapter {adapter!r}.")
        return self.adapters[adapter]

    async def create(self, adapter: str, lora: LoraSpec, *, seed: int = 0) -> None:
        await self.gate.wait()
        if adapter in self.adapters:
            raise EngineError(f"There is an adapter {adapter!r} already.")
        self.log.append(("create", adapter))
        self.adapters[adapter] = Adapter(lora)

    async def forward(
        self, adapter: str, samples: Sequence[Sample], *, temperature: float = 1.0
    ) -> tuple[Floats, ...]:
        found = await self._turn("forward", adapter)
        return tuple(_logprobs(found.weights, s) for s in samples)

    async def forward_backward(
        self, adapter: str, samples: Sequence[Sample], loss: LossSpec
    ) -> ForwardBackwardResult:
        found = await self._turn("forward_backward", adapter)
        logprobs = tuple(_logprobs(found.weights, s) for s in samples)
        total = 0.0
        for sample, values in zip(samples, logprobs, strict=True):
            assert sample.weights is not None and sample.advantages is not None
            scale = sample.weights * (1 if loss.name == "cross_entropy" else sample.advantages)
            total -= float((scale * values).sum())
            ids = sample.token_ids if sample.target_ids is None else sample.target_ids
            chances = np.exp(log_softmax(found.weights))
            for token, weight in zip(ids[1:], scale[1:], strict=True):
                found.gradient += weight * (chances - np.eye(VOCAB, dtype=np.float32)[token])
        if not np.isfinite(total):
            raise EngineError(f"The loss is {total}.")
        return ForwardBackwardResult(total, logprobs, {"entropy": 1.0})

    async def optim_step(self, adapter: str, params: AdamParams) -> dict[str, float]:
        found = await self._turn("optim_step", adapter)
        found.moment = params.betas[0] * found.moment + found.gradient
        found.weights = found.weights - params.lr * found.moment
        norm = float(np.linalg.norm(found.gradient))
        found.gradient = np.zeros(VOCAB, np.float32)
        found.steps += 1
        return {"grad_norm": norm, "lr": params.lr}

    def adapter_size(self, lora: LoraSpec) -> int:
        return lora.rank * VOCAB

    async def discard(self, adapter: str) -> None:
        if adapter not in self.adapters:
            raise EngineError(f"There is no adapter {adapter!r}.")
        self.adapters[adapter].gradient = np.zeros(VOCAB, np.float32)

    async def snapshot(self, adapter: str) -> str:
        found = await self._turn("snapshot", adapter)
        return self._shelve(found.weights)

    def _shelve(self, weights: Floats) -> str:
        self._number += 1
        name = f"snapshot-{self._number}"
        self.snapshots[name] = weights.copy()
        self.opened[name] = 1
        return name

    async def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        weights: str = "",
        tenant: str = "",
    ) -> AsyncIterator[TokenChunk]:
        self.streams.append((weights, tenant))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await self.gate.wait()
            logprobs = log_softmax(self._sampling(weights))
            rng = np.random.default_rng(params.seed)
            for i in range(params.max_tokens):
                await asyncio.sleep(0)
                token = int(rng.choice(VOCAB, p=np.exp(logprobs) / np.exp(logprobs).sum()))
                if params.temperature == 0:
                    token = int(logprobs.argmax())
                finish = None
                if token in params.stop_token_ids:
                    finish = "stop"
                elif i + 1 == params.max_tokens:
                    finish = "length"
                top = _top(logprobs, params.top_logprobs)
                tops = (top,) if params.top_logprobs else ()
                yield TokenChunk((token,), (float(logprobs[token]),), 0, finish, tops)
                if finish == "stop":
                    return
        finally:
            self.running -= 1

    async def score(self, token_ids: Sequence[int], *, weights: str = "", top_k: int = 0) -> Scores:
        await self.gate.wait()
        values = log_softmax(self._sampling(weights))
        logprobs = values[np.asarray(token_ids)].astype(np.float32)
        logprobs[0] = np.nan
        top = tuple(_top(values, top_k) if i else {} for i in range(len(token_ids)))
        return Scores(logprobs, top if top_k else ())

    def _sampling(self, weights: str) -> Floats:
        if not weights:
            return np.zeros(VOCAB, np.float32)
        if weights not in self.snapshots:
            raise EngineError(f"There is no snapshot {weights!r}.")
        return self.snapshots[weights]

    async def export(self, source: str, path: Path, *, optimizer: bool = False) -> None:
        await self.gate.wait()
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        path.mkdir(parents=True)
        adapter = self.adapters.get(source)
        if adapter is None:
            np.savez(path / "w.npz", weights=self._sampling(source))
        else:
            np.savez(path / "w.npz", weights=adapter.weights, moment=adapter.moment)

    async def restore(self, adapter: str, path: Path, *, optimizer: bool = False) -> None:
        found = await self._turn("restore", adapter)
        try:
            saved = np.load(path / "w.npz")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read.") from error
        found.weights = saved["weights"]
        found.moment = saved["moment"] if optimizer else np.zeros(VOCAB, np.float32)
        found.gradient = np.zeros(VOCAB, np.float32)

    async def open_snapshot(self, path: Path) -> str:
        try:
            return self._shelve(np.load(path / "w.npz")["weights"])
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read.") from error

    async def release(self, name: str) -> None:
        if name in self.adapters:
            self.log.append(("release", name))
            del self.adapters[name]
        elif self.opened[name]:
            self.opened[name] -= 1
            if not self.opened[name]:
                del self.snapshots[name]
        else:
            raise EngineError(f"There is nothing called {name!r}.")

    def stats(self) -> HostStats:
        held = len(self.adapters), len(self.snapshots)
        return HostStats(
            *held, 100, 0, 0, self.running, 0, 0, 0, 0, 0, 0, 0.0, self.doing, self.beat_age
        )


def log_softmax(values: Floats) -> Floats:
    shifted = values - values.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)


def _logprobs(weights: Floats, sample: Sample) -> Floats:
    ids = sample.token_ids if sample.target_ids is None else sample.target_ids
    values = log_softmax(weights)[np.asarray(ids)]
    return np.where(sample.loss_mask, values, 0).astype(np.float32)


def _top(logprobs: Floats, k: int) -> dict[int, float]:
    best = np.argsort(-logprobs, kind="stable")[:k]
    return {int(i): float(logprobs[i]) for i in best}
