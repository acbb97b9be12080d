"""Tiny models on disk, samples over their vocabulary, losses, and a plain reference."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from astuner.engine.embedded.learner import Learner
from astuner.engine.embedded.weights import LoraSpec, Weights
from astuner.engine.protocol import LossInput, LossOutput, LossSpec
from astuner.types import Sample
from tests.spans import spans_of

from .tiny import VOCAB, tiny_model

Result = TypeVar("Result")


def save_tiny(folder: Path, family: str = "llama") -> Path:
    """A whole model folder: weights, tokenizer and chat template."""
    tiny_model(family).save_pretrained(folder)
    vocab = {f"<{i}>": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<0>")), eos_token="<2>"
    )
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    return folder


def load_tiny(folder: Path, *, lora: LoraSpec | None = LoraSpec(rank=4, alpha=8)) -> Weights:  # noqa: B008
    """In float32, LoRA on every linear layer unless told otherwise."""
    return Weights.load(folder, device="cpu", dtype="float32", lora=lora, seed=3)


def learner(weights: Weights, budget: int = 4096, **settings: Any) -> Learner:
    losses = {"pg": policy_gradient, "seq": sequence_ratio}
    return Learner(
        weights, losses.__getitem__, {"k3": k3}.__getitem__, micro_batch_tokens=budget, **settings
    )


def policy_gradient(inputs: LossInput) -> LossOutput:
    per_token = -inputs.advantages * inputs.logprobs
    metrics = {"token_loss": per_token.detach()}
    return LossOutput((inputs.weights * per_token).sum(), metrics)


def sequence_ratio(inputs: LossInput, *, power: float = 1.0) -> LossOutput:
    """Needs all tokens of a sample at once: the mean log-ratio of the sequence."""
    gap = inputs.logprobs - inputs.behaviour_logprobs
    zeros = gap.new_zeros(inputs.num_segments)
    sums = zeros.index_add(0, inputs.segments, gap)
    counts = zeros.index_add(0, inputs.segments, torch.ones_like(gap))
    ratio = (power * sums / counts).exp()[inputs.segments]
    return LossOutput(
        -(inputs.weights * inputs.advantages * ratio).sum(), {"ratio": ratio.detach()}
    )


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    gap = reference - logprobs
    return gap.exp() - 1 - gap


def drain(steps: Generator[None, None, Result]) -> Result:
    """Run a long verb to its end, as the device thread does."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def sample(name: str, *parts: tuple[Sequence[int], bool], seed: int = 0) -> Sample:
    """Parts are (token ids, whether they were sampled). Advantages and weights differ
    from token to token, so that a mix-up of any two shows."""
    ids = np.concatenate([np.asarray(p, np.int32) for p, _ in parts])
    mask = np.concatenate([np.full(len(p), sampled) for p, sampled in parts])
    rng = np.random.default_rng(seed)

    def drawn(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, len(ids)).astype(np.float32)

    return Sample(
        sample_id=name,
        episode_id=f"episode-{name}",
        group_id="g",
        task_id="t",
        agent_name="default",
        target_tag="default",
        token_ids=ids,
        loss_mask=mask,
        logprobs=np.where(mask, drawn(-6, -3), 0).astype(np.float32),
        spans=spans_of(np.where(mask, 0, -1), np.where(mask, 0, -1)),
        advantages=drawn(-1, 1),
        weights=drawn(0.1, 0.3),
    )


def tokens(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def with_advantage(samples: Sequence[Sample], value: float) -> list[Sample]:
    return [
        replace(
            s,
            advantages=np.full(len(s.token_ids), value, np.float32),
            weights=np.full(len(s.token_ids), 0.1, np.float32),
        )
        for s in samples
    ]


def unpacked_logprobs(model: Any, item: Sample, temperature: float = 1.0) -> Tensor:
    """Of the trained tokens: one sample alone through plain transformers attention."""
    ids = torch.from_numpy(item.token_ids.astype(np.int64))[None]
    logits = model(input_ids=ids).logits[0, :-1] / temperature
    chosen = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return chosen[torch.from_numpy(item.loss_mask[1:])]


def unpacked_gradients(
    model: Any, samples: Sequence[Sample], spec: LossSpec, loss: Callable[..., LossOutput]
) -> dict[str, Tensor]:
    """Gradients of the same loss, sample by sample, without packing."""
    model.zero_grad()
    for item in samples:
        logprobs = unpacked_logprobs(model, item, spec.temperature)
        mask = item.loss_mask

        def flat(array: Any, mask: Any = mask) -> Tensor:
            return torch.from_numpy(array[mask])

        inputs = LossInput(
            logprobs,
            flat(item.logprobs),
            logprobs.detach(),
            None,
            flat(item.advantages),
            flat(item.weights),
            torch.zeros(int(mask.sum()), dtype=torch.int64),
            1,
        )
        loss(inputs, **spec.params).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
