"""Tokens per second of the embedded engine, beside transformers' `generate`.

    python benchmarks/decode.py [--model smollm2-135m] [--prompts 8] [--repeats 8] [--tokens 64]

Each of the prompts is continued `repeats` times for exactly `tokens` tokens at
temperature 1. "limit" is what the machine's measured matrix product speed would
allow if a token cost nothing else: two floating point operations a weight.
Nothing is recorded; run it alone, two busy processes make each other many times
slower.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.embedded.weights import LoraSpec
from astuner.engine.model_source import resolve_model
from astuner.engine.protocol import SamplingParams, generate


def main() -> None:
    args = arguments()
    folder = resolve_model(args.model)
    model = EmbeddedModel.open(folder, lora=None if args.no_lora else LoraSpec())
    prompts = [
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {17 + i} + 25? Think step by step."}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for i in range(args.prompts)
    ]
    total = args.prompts * args.repeats * args.tokens
    weights = model._weights
    print(f"{args.prompts} prompts x {args.repeats} x {args.tokens} tokens, {weights.dtype}")
    asyncio.run(run_engine(model, prompts, args.repeats, 4))  # warm up
    for repeat in range(args.rounds):
        seconds = asyncio.run(run_engine(model, prompts, args.repeats, args.tokens, repeat))
        print(f"embedded engine          {total / seconds:8.0f} tokens/s  ({seconds:.2f} s)")
    print(f"  {model.stats()}")
    parameters = sum(p.numel() for p in weights.states.select("reference").parameters())
    dtype, device = weights.dtype, weights.device
    model.close()
    if not args.no_generate:
        seconds = run_generate(folder, prompts, args.repeats, args.tokens, dtype, device)
        print(f"transformers generate    {total / seconds:8.0f} tokens/s  ({seconds:.2f} s)")
    speed = matmul_speed(dtype, device)
    limit = speed / (2 * parameters)
    print(f"limit                    {limit:8.0f} tokens/s  ({speed / 1e9:.0f} GFLOP/s)")


async def run_engine(
    model: EmbeddedModel, prompts: list[list[int]], repeats: int, tokens: int, seed: int = 0
) -> float:
    """Seconds for all; every round draws other tokens, but finds the prompts cached."""
    params = [SamplingParams(tokens, seed=seed * repeats + i) for i in range(repeats)]
    start = time.perf_counter()
    await asyncio.gather(*(generate(model, ids, p) for ids in prompts for p in params))
    return time.perf_counter() - start


def run_generate(
    folder: Path,
    prompts: list[list[int]],
    repeats: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """The same work by the library most people would use: one left-padded batch."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(ids)) + ids for ids in prompts for _ in range(repeats)]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts for _ in range(repeats)]
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            do_sample=True,
            top_k=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
    return time.perf_counter() - start


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a product of 2048 x 2048 matrices, best of five."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-lora", action="store_true", help="as with full-weight training")
    parser.add_argument("--no-generate", action="store_true", help="skip transformers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
