"""How long training takes with shared prefixes computed once, and how near to the limit.

    python benchmarks/training.py [--parts update trees rate memory] [--runs 3] [--write]

Compares: "update", one GRPO step on the quickstart's batch (8 prompts of about 53 tokens x 16
repeats, answers of 2-8 tokens, LoRA of rank 16 on every linear layer, bfloat16 where it is
fast), by the embedded engine's learner (packed) and as prompt + answer of every episode in one
padded batch through plain transformers, logits only on the answers. "Trees", forked
episodes of several turns (see merging.py): how many times faster than with nothing shared, as
a share of what the tokens alone would allow. "Rate", the update's own matrix products
(counted) per second at about 4,000 packed tokens, as a share of the rate of one product of
the model's size measured just before: 100 % would be a machine that does nothing else.
"Memory", the peak of a process that trains on trees of about 8,000 tokens. Seconds are of
forward, backward and optimizer step: the median of the runs.

It does not show sampling, other models, or what a GPU's fused kernels do to either side.
Measure on an idle machine: a second busy process makes both several times slower.
"""

from __future__ import annotations

import astuner  # noqa: F401 - first: it tells OpenMP not to spin, which torch reads when loaded

# isort: split
import argparse
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import merging
import numpy as np
import torch
from peft import PeftModel
from record import Report
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from astuner.algorithm import find_kl, find_loss
from astuner.engine.embedded.learner import Learner
from astuner.engine.embedded.packing import pack
from astuner.engine.embedded.weights import LoraSpec, Weights
from astuner.engine.model_source import resolve_model
from astuner.engine.protocol import AdamParams, LossSpec
from astuner.types import Sample

UPDATE, TREES, RATE, MEMORY = "One GRPO update", "Forked trees", "Rate", "Memory"
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
        spans=np.array([[len(prompt), len(ids), 0, 0]], np.int32),
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


# ---------------------------------------------------------------- measuring


def timed(update: Callable[[], None]) -> float:
    start = time.perf_counter()
    update()
    return time.perf_counter() - start


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of the model's size, best of 20."""
    left, right = torch.randn(1024, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    return 2 * 1024 * 576 * 1536 / min(timed(lambda: torch.mm(left, right)) for _ in range(20))


def _packed_flops(
    inputs: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any
) -> int:
    """Of a product with packed weights, which torch does not count."""
    return 2 * math.prod(inputs) * out_shape[-1]


def measured(update: Callable[[], None], runs: int, dtype: torch.dtype) -> dict[str, float]:
    """Its median seconds, its operations, and its rate beside the machine's."""
    has_packed = torch.backends.mkldnn.is_available()
    packed = {torch.ops.mkldnn._linear_pointwise: _packed_flops} if has_packed else {}
    with FlopCounterMode(display=False, custom_mapping=packed) as counted:
        update()
    flops, rate = counted.get_total_flops(), matmul_rate(dtype)
    seconds = median(timed(update) for _ in range(runs))
    return {
        "s": seconds,
        "GFLOP": flops / 1e9,
        "GFLOP/s": flops / seconds / 1e9,
        "one product GFLOP/s": rate / 1e9,
        "%": 100 * flops / seconds / rate,
    }


def one_update(weights: Weights, args: argparse.Namespace, report: Report) -> None:
    samples = make_samples(weights.tokenizer)
    learner = new_learner(weights, 4096)
    found = measured(lambda: packed_update(learner, samples), args.runs, weights.dtype)
    report.row(UPDATE, {"": "packed", **found})
    if not args.padded:
        return
    model, optimizer = padded_model(weights)
    batch = padded_batch(samples)
    padded = measured(lambda: padded_update(model, optimizer, batch), 1, weights.dtype)
    report.row(UPDATE, {"": "padded", **padded})
    ratio = padded["s"] / found["s"]
    report.figure(UPDATE, "training, times faster than a padded batch", ratio, "at least 8")


def trees(weights: Weights, args: argparse.Namespace, report: Report) -> None:
    """The two ways take turns."""
    learner = new_learner(weights, 4096)
    shares: list[float] = []
    for turns in args.turns:
        together = merging.group(merging.forked, turns, "prefix")
        single = merging.apart(together)
        pairs = [
            (
                timed(lambda s=single: packed_update(learner, s)),
                timed(lambda s=together: packed_update(learner, s)),
            )
            for _ in range(args.runs)
        ]
        alone, tree = (median(column) for column in zip(*pairs, strict=True))
        nodes = packed_tokens(together, 4096)
        possible = merging.tokens(single) / nodes
        shares.append(100 * alone / tree / possible)
        report.row(
            TREES,
            {
                "turns": turns,
                "tokens of the samples": merging.tokens(single),
                "of the tree": nodes,
                "possible": possible,
                "s with nothing shared": alone,
                "s as a tree": tree,
                "reached": alone / tree,
                "%": shares[-1],
            },
        )
    report.figure(TREES, "forked trees, % of the possible ratio", median(shares), "at least 85")


def rate(weights: Weights, args: argparse.Namespace, report: Report) -> None:
    learner = new_learner(weights, 4096)
    samples = merging.group(merging.chat, args.long, "prefix")
    found = measured(lambda: packed_update(learner, samples), args.runs, weights.dtype)
    report.row(RATE, {"packed tokens": packed_tokens(samples, 4096), **found})
    report.figure(RATE, "training, % of the matrix product rate", found["%"], "at least 40")


def memory(args: argparse.Namespace, report: Report) -> None:
    """In a process of its own for each budget: a peak is the process's."""
    for budget in (8192, 2048):
        command = [sys.executable, __file__, "--model", args.model, "--peak", str(budget)]
        command += ["--long", str(args.long)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        loaded, peak, nodes, seconds = map(float, done.stdout.split())
        report.row(
            MEMORY,
            {
                "micro_batch_tokens": budget,
                "packed tokens": int(nodes),
                "GiB once loaded": loaded,
                "GiB at the peak": peak,
                "s": seconds,
            },
        )
    most = max(float(row["GiB at the peak"] or 0) for row in report.rows(MEMORY))
    report.figure(MEMORY, "trees of 8,000 tokens, GiB at the peak", most, "under 8")


def peak(weights: Weights, budget: int, turns: int) -> None:
    """What the child process does."""
    learner = new_learner(weights, budget)
    samples = merging.group(merging.chat, 2 * turns, "prefix")
    loaded = gib()
    seconds = timed(lambda: packed_update(learner, samples))
    print(loaded, gib(), packed_tokens(samples, budget), seconds)


def gib() -> float:
    """The most that was resident until now, of this program: what `resource` knows counts the
    program that started it too."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**20


def packed_tokens(samples: Sequence[Sample], budget: int) -> int:
    return sum(len(row.ids_T) for row in pack(samples, budget))


def new_learner(weights: Weights, budget: int) -> Learner:
    return Learner(weights, find_loss, find_kl, micro_batch_tokens=budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = ["update", "trees", "rate", "memory"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--turns", type=int, nargs="+", default=[6, 12], help="of the trees")
    parser.add_argument("--long", type=int, default=50, help="turns of the long episodes")
    parser.add_argument("--no-padded", dest="padded", action="store_false")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    weights = Weights.load(resolve_model(args.model), device="cpu", lora=LoraSpec(), seed=0)
    if args.peak:
        peak(weights, args.peak, args.long)
        return
    report = Report("training", __doc__, write=args.write)
    packed_update(new_learner(weights, 4096), merging.group(merging.chat, 2, "prefix"))  # warm up
    if "update" in args.parts:
        one_update(weights, args, report)
    if "trees" in args.parts:
        trees(weights, args, report)
    if "rate" in args.parts:
        rate(weights, args, report)
    if "memory" in args.parts:
        memory(args, report)


if __name__ == "__main__":
    main()
