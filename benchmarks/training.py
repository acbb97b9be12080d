"""How long one GRPO update takes, packed and padded, and how near to the machine's limit.

The batch is that of the quickstart: 8 prompts of about 53 tokens x 16 repeats, answers of
2-8 tokens, LoRA of rank 16 on every linear layer, bfloat16 where it is fast. `packed` is
the embedded engine's learner; `padded` is prompt + answer of every episode in one padded
batch through plain transformers, logits only on the answers. Seconds are the best of
several runs of forward, backward and optimizer step. `of matmul` is the rate at which the
update's own matrix products (counted) were done, as a share of the rate of one large
product measured just before: 100 % would be a machine that does nothing else.

Measure on an idle machine: a second busy process makes both several times slower.

    python benchmarks/training.py [--model smollm2-135m] [--runs 3] [--no-padded]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from astuner.algorithm import find_kl, find_loss
from astuner.engine.embedded.learner import Learner
from astuner.engine.embedded.weights import LoraSpec, Weights
from astuner.engine.model_source import resolve_model
from astuner.engine.protocol import AdamParams, LossSpec
from astuner.types import Sample

PROMPTS, REPEATS = 8, 16


def make_samples(tokenizer: object, seed: int = 0) -> list[Sample]:
    """Sums and answers of 2-8 tokens as an untrained model gives them: few are the same."""
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    for group in range(PROMPTS):
        a, b = rng.integers(1, 10, 2)
        question = f"State the final answer to the following arithmetic problem: {a} + {b} ="
        prompt = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            [{"role": "user", "content": f"{question}\nReply with just the number."}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for repeat in range(REPEATS):
            answer = [*rng.integers(100, 20_000, rng.integers(1, 8)).tolist(), 2]
            samples.append(_sample(f"{group}.{repeat}", prompt, answer, rng))
    return samples


def _sample(name: str, prompt: list[int], answer: list[int], rng: np.random.Generator) -> Sample:
    ids = np.array(prompt + answer, np.int32)
    mask = np.arange(len(ids)) >= len(prompt)
    sampled = mask.astype(np.int32) - 1
    return Sample(
        sample_id=name,
        episode_id=name,
        group_id=name.split(".")[0],
        task_id="",
        agent_name="",
        target_tag="",
        token_ids=ids,
        loss_mask=mask,
        logprobs=np.where(mask, -5.0, 0.0).astype(np.float32),
        weight_versions=sampled,
        turns=sampled,
        advantages=np.full(len(ids), rng.normal(), np.float32),
        weights=np.full(len(ids), 1 / (PROMPTS * REPEATS), np.float32),
    )


def packed_update(learner: Learner, samples: list[Sample]) -> None:
    for _ in learner.forward_backward(samples, LossSpec("policy_gradient")):
        pass
    learner.optim_step(AdamParams(lr=1e-4))


def padded_update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[Tensor]) -> None:
    ids, seen, answers, weights = batch
    width = answers.shape[1] + 1
    out = model(input_ids=ids, attention_mask=seen, logits_to_keep=width, use_cache=False)
    logprobs = out.logits[:, :-1].float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    torch.autograd.backward(-(logprobs * weights).sum())
    optimizer.step()
    optimizer.zero_grad()


def padded_batch(samples: list[Sample]) -> list[Tensor]:
    """Left-padded ids and mask; answers and their weights, right-aligned."""
    width = max(len(s.token_ids) for s in samples)
    longest = max(s.num_trained for s in samples)
    ids, seen = (torch.zeros(len(samples), width, dtype=torch.long) for _ in range(2))
    weights = torch.zeros(len(samples), longest)
    for row, s in enumerate(samples):
        ids[row, width - len(s.token_ids) :] = torch.from_numpy(s.token_ids)
        seen[row, width - len(s.token_ids) :] = 1
        assert s.advantages is not None and s.weights is not None
        part = (s.advantages * s.weights)[s.loss_mask]
        weights[row, longest - len(part) :] = torch.from_numpy(part)
    return [ids, seen, ids[:, -longest:], weights]


def padded_model(weights: Weights) -> tuple[nn.Module, torch.optim.Optimizer]:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(weights.path, dtype=weights.dtype)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    return tuned, torch.optim.AdamW(trained, lr=1e-4)


def best_seconds(update: Callable[[], None], runs: int) -> float:
    times: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        update()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of the model's size, best of 20."""
    left, right = torch.randn(1024, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    return 2 * 1024 * 576 * 1536 / best_seconds(lambda: torch.mm(left, right), 20)


def report(name: str, update: Callable[[], None], runs: int, rate: float) -> float:
    with FlopCounterMode(display=False) as counted:
        update()
    flops, seconds = counted.get_total_flops(), best_seconds(update, runs)
    print(
        f"| {name} | {seconds:.2f} | {flops / 1e9:.0f} | {flops / seconds / 1e9:.0f} "
        f"| {flops / seconds / rate:.0%} |",
        flush=True,
    )
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-padded", action="store_true")
    args = parser.parse_args()
    weights = Weights.load(resolve_model(args.model), device="cpu", lora=LoraSpec(), seed=0)
    samples = make_samples(weights.tokenizer)
    learner = Learner(weights, find_loss, find_kl, micro_batch_tokens=4096)
    rate = matmul_rate(weights.dtype)
    print(f"{weights.dtype}, {torch.get_num_threads()} threads, matmul {rate / 1e9:.0f} GFLOP/s")
    print("| update | seconds | GFLOP | GFLOP/s | of matmul |\n|---|---|---|---|---|")
    packed = report("packed", lambda: packed_update(learner, samples), args.runs, rate)
    if not args.no_padded:
        model, optimizer = padded_model(weights)
        batch = padded_batch(samples)
        padded = report("padded", lambda: padded_update(model, optimizer, batch), 1, rate)
        print(f"\npadded / packed: {padded / packed:.1f}")


if __name__ == "__main__":
    main()
