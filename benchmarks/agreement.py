"""Whether the trainer gives a token the logprob it was sampled with.

    python benchmarks/agreement.py [--model smollm2-135m] [--sequences 64] [--write]

Random prompts of 16 tokens are answered with 32 to 38 tokens each, all at once, under a
LoRA adapter of rank 8. The table has the largest difference of a token's logprob between
what sampling reported and what the trainer computes over packed rows: by `forward`, and by
`forward_backward`, where the loss sees it; before any update and after three. In bfloat16
one rounding that falls the other way early in the model makes 0.01 to 0.1 at its end: there
is no "nearly". A busy machine makes it slower and changes no figure. It does not show how
far other engines are from their trainers.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import Report

from astuner.algorithm import find_kl, find_loss
from astuner.engine.embedded.host import EmbeddedHost
from astuner.engine.model_source import resolve_model
from astuner.engine.protocol import AdamParams, LoraSpec, LossSpec, SamplingParams, generate
from astuner.types import Sample

TABLE = "Largest differences, in nats"
PROMPT, ANSWER, UPDATES = 16, 32, 3
BOUNDS = {"bfloat16": 1e-3, "float32": 1e-5}
LOSS = LossSpec("policy_gradient")


class Sampler:
    """The host as an engine under one snapshot."""

    def __init__(self, host: EmbeddedHost, weights: str) -> None:
        self.max_context = host.max_context
        self._host, self._weights = host, weights

    def stream(self, ids: Sequence[int], params: SamplingParams) -> Any:
        return self._host.stream(ids, params, weights=self._weights)


async def sampled(host: EmbeddedHost, weights: str, prompts: list[list[int]]) -> list[Sample]:
    engine = Sampler(host, weights)
    answers = await asyncio.gather(
        *(
            generate(engine, ids, SamplingParams(ANSWER + i % 7, temperature=1.0, seed=i))
            for i, ids in enumerate(prompts)
        )
    )
    return [
        as_sample(str(i), ids, answer.token_ids, answer.logprobs)
        for i, (ids, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def as_sample(name: str, prompt: list[int], answer: Any, logprobs: Any) -> Sample:
    ids = np.concatenate([prompt, answer]).astype(np.int32)
    mask = np.arange(len(ids)) >= len(prompt)
    known = np.zeros(len(ids), np.float32)
    known[mask] = logprobs
    return Sample(
        sample_id=name,
        episode_id=name,
        group_id=name,
        task_id="",
        agent_name="",
        target_tag="",
        token_ids=ids,
        loss_mask=mask,
        logprobs=known,
        spans=np.array([[len(prompt), len(ids), 0, 0]], np.int32),
        advantages=np.full(len(ids), np.sin(len(name) + ids[0]), np.float32),
        weights=np.full(len(ids), 1e-3, np.float32),
    )


def largest(samples: Sequence[Sample], logprobs: Sequence[Any]) -> float:
    pairs = zip(samples, logprobs, strict=True)
    return max(float(np.abs(seen - s.logprobs)[s.loss_mask].max()) for s, seen in pairs)


async def differences(model: Path, dtype: str, sequences: int) -> list[float]:
    """forward and forward_backward before updates, then both after."""
    host = EmbeddedHost.open(model, device="cpu", dtype=dtype, losses=find_loss, kls=find_kl)
    await host.create("it", LoraSpec(8, 32.0))
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, len(host.tokenizer), (sequences, PROMPT)).tolist()
    found: list[float] = []
    for _ in range(2):
        samples = await sampled(host, await host.snapshot("it"), prompts)
        found.append(largest(samples, await host.forward("it", samples)))
        found.append(largest(samples, (await host.forward_backward("it", samples, LOSS)).logprobs))
        for update in range(UPDATES):
            if update:
                await host.forward_backward("it", samples[:8], LOSS)
            await host.optim_step("it", AdamParams(1e-3))
    host.close()
    return found


async def measure(model: Path, sequences: int, report: Report) -> None:
    for dtype, bound in BOUNDS.items():
        found = await differences(model, dtype, sequences)
        names = ("forward", "forward_backward")
        cells = zip([*names, *(f"{name} after updates" for name in names)], found, strict=True)
        report.row(TABLE, {"dtype": dtype, **dict(cells), "bound": bound})
        name = f"sampler and trainer, largest difference of a logprob in {dtype}"
        report.figure(TABLE, name, max(found), f"under {bound:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    report = Report("agreement", __doc__, write=args.write)
    asyncio.run(measure(resolve_model(args.model), args.sequences, report))


if __name__ == "__main__":
    main()
