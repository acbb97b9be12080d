"""The logprob a token was sampled with is the one the trainer gives it, in both dtypes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from astuner.engine.embedded.host import EmbeddedHost
from astuner.engine.embedded.packing import pack
from astuner.engine.protocol import AdamParams, LoraSpec, LossSpec, SamplingParams, generate
from astuner.types import Sample

from .test_host import From
from .tiny import prompt, tiny_model
from .tiny_training import policy_gradient, sample, save_tiny

pytestmark = pytest.mark.timeout(60)
BOUND = {"float32": 1e-5, "bfloat16": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads and layers as wide as those of real models take the same CPU kernels."""
    folder = save_tiny(tmp_path_factory.mktemp("llama"))
    model = tiny_model(hidden_size=64, intermediate_size=96, head_dim=32)
    model.save_pretrained(folder)
    return folder


async def drawn(host: EmbeddedHost, weights: str, seed: int) -> list[Sample]:
    """64 sequences: 16 prompts of 3 to 150 tokens, four answers of 2 to 40 to each."""
    rng = np.random.default_rng(seed)
    prompts = [prompt(100 * seed + i, int(rng.integers(3, 150))) for i in range(16)]
    asked = [
        (ids, SamplingParams(max_tokens=int(rng.integers(2, 40)), temperature=1.0, seed=i))
        for i, ids in enumerate(prompts * 4)
    ]
    answers = await asyncio.gather(
        *(generate(From(host, weights), ids, params) for ids, params in asked)
    )
    samples: list[Sample] = []
    for i, ((ids, _), answer) in enumerate(zip(asked, answers, strict=True)):
        made = sample(str(i), (ids, False), (answer.token_ids.tolist(), True), seed=i)
        made.logprobs[made.loss_mask] = answer.logprobs
        samples.append(made)
    return samples


def difference(samples: Sequence[Sample], logprobs: Sequence[np.ndarray]) -> float:
    """The largest, over all trained tokens."""
    pairs = zip(samples, logprobs, strict=True)
    return max(float(np.abs(seen - s.logprobs)[s.loss_mask].max()) for s, seen in pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_sampler_and_trainer_agree(folder: Path, dtype: str) -> None:
    """Before and after updates, by `forward` and by what the loss itself sees; in rows that
    hold many sequences and in rows that hold few."""
    host = EmbeddedHost.open(
        folder,
        device="cpu",
        dtype=dtype,
        losses={"pg": policy_gradient}.__getitem__,
        micro_batch_tokens=700,
    )
    await host.create("a", LoraSpec(rank=4, alpha=8))
    for round_ in range(2):
        samples = await drawn(host, await host.snapshot("a"), round_)
        assert len(pack(samples, 700)) > 3
        seen = await host.forward("a", samples)
        trained = await host.forward_backward("a", samples, LossSpec("pg"))
        assert difference(samples, seen) < BOUND[dtype]
        assert difference(samples, trained.logprobs) < BOUND[dtype]
        assert trained.metrics["logprob_gap"] < BOUND[dtype]
        for _ in range(3):
            await host.optim_step("a", AdamParams(lr=0.03))
            await host.forward_backward("a", samples, LossSpec("pg"))
    host.close()


@pytest.mark.parametrize(("inputs", "outputs"), [(576, 1536), (1536, 576), (576, 16), (16, 192)])
def test_a_row_of_a_product_does_not_depend_on_the_other_rows(inputs: int, outputs: int) -> None:
    """What the agreement stands on: at the shapes of a real model, in bfloat16, a token's row
    is the same among 8 tokens as among 2048."""
    torch.manual_seed(0)
    rows, weight = (torch.randn(n, inputs).bfloat16() for n in (2048, outputs))
    whole = torch.nn.functional.linear(rows, weight)
    for few in (8, 64, 512):
        assert torch.equal(torch.nn.functional.linear(rows[:few], weight), whole[:few])
