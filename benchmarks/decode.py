"""Tokens per second of the embedded engine, beside others and the machine's limit.

    python benchmarks/decode.py [--parts sides lengths turns] [--rounds 3] [--write]

Compares, for 8 prompts continued 8 times each for exactly 64 tokens at temperature 1, in
bfloat16: the embedded engine on the base alone, as the others; the same with a LoRA adapter of
rank 16 that is computed beside the base, as in a run; transformers' `generate` in one left-padded
batch; and vLLM for CPUs, eagerly and without tcmalloc, in an environment of its own (CPU only;
--no-vllm leaves it out). "Limit" is what the matrix product rate measured in the same round would
allow if a token cost nothing but two operations a weight. All take turns in one run; figures are
medians of the rounds' ratios.

"Lengths": six times as many sequences as places, of 4 to 64 tokens, against as many tokens in
sequences of one length: whether places that fall free are filled. At the end there is nothing to
fill them with and the last sequences run nearly alone, which counts the more the fewer there are:
--waves 3 or 1 shows it. "Turns": 8 conversations at once, 48 new tokens and 24 sampled a turn;
how much of each prompt is computed, and how long the turn takes against the same prompts never
seen before.

Does not show: latency of one sequence, long contexts, quantised weights, or vLLM on a GPU;
vLLM's newest release may be faster than the pinned one.
"""

from __future__ import annotations

import astuner  # noqa: F401 - first: it tells OpenMP not to spin, which torch reads when loaded

# isort: split
import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from record import Report
from transformers import AutoModelForCausalLM
from waiting import Side, build

from astuner.engine.embedded.host import EmbeddedHost
from astuner.engine.embedded.weights import LoraSpec
from astuner.engine.model_source import resolve_model
from astuner.engine.protocol import Completion, SamplingParams, TokenChunk, generate

SIDES, LENGTHS, TURNS = "Side by side", "Lengths", "Turns of a conversation"
BASE, ADAPTER = "astuner", "astuner with LoRA"
TURN_NEW, TURN_SAMPLED, NUM_TURNS = 48, 24, 5
Prompts = list[list[int]]


# ---------------------------------------------------------------- the engine


class Engine:
    """The base, or it under an adapter that changes nothing yet but is computed all the same.
    Both are of one host: two engines in a process have more threads than there are cores."""

    def __init__(self, host: EmbeddedHost, weights: str) -> None:
        self.host = host
        self._weights = weights

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncIterator[TokenChunk]:
        return self.host.stream(prompt_ids, params, weights=self._weights)


def under_an_adapter(host: EmbeddedHost) -> Engine:
    async def snapshot() -> str:
        await host.create("a", LoraSpec())
        return await host.snapshot("a")

    return Engine(host, asyncio.run(snapshot()))


def chat_prompts(host: EmbeddedHost, count: int) -> Prompts:
    return [
        host.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What is {17 + i} + 25? Think step by step."}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for i in range(count)
    ]


def run_engine(
    engine: Engine, prompts: Sequence[Sequence[int]], tokens: Sequence[int], seed: int
) -> tuple[float, list[Completion]]:
    """Seconds until each prompt has got its number of tokens, all at once."""

    async def run() -> list[Completion]:
        return await asyncio.gather(
            *(
                generate(engine, ids, SamplingParams(count, seed=seed * 1000 + i))
                for i, (ids, count) in enumerate(zip(prompts, tokens, strict=True))
            )
        )

    start = time.perf_counter()
    done = asyncio.run(run())
    return time.perf_counter() - start, done


# ---------------------------------------------------------------- side by side


def hf_generate(
    folder: Path, prompts: Prompts, repeats: int, dtype: torch.dtype, device: torch.device
) -> Callable[[int], float]:
    """The same work by the library most people would use: one left-padded batch."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(ids)) + ids for ids in prompts for _ in range(repeats)]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts for _ in range(repeats)]

    def run(tokens: int) -> float:
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

    return run


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a product of 2048 x 2048 matrices, best of five."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def side_by_side(engine: Engine, folder: Path, args: argparse.Namespace, report: Report) -> None:
    host = engine.host
    base: Any = host._bank._layers.model
    weight = next(base.parameters())
    dtype, device = weight.dtype, weight.device
    parameters = sum(p.numel() for p in base.parameters())
    prompts = chat_prompts(host, args.prompts)
    total = args.prompts * args.repeats * args.tokens
    every = [ids for ids in prompts for _ in range(args.repeats)]

    def there(work: Callable[[], float]) -> float:
        """On the engine's thread: with products on two threads, libgomp sees more threads than
        cores, and its own then sleep after each product."""
        return host._thread.submit("benchmark", work).result()

    with ExitStack() as stack:
        sides: dict[str, Callable[[int], float]] = {}
        counts = [args.tokens] * len(every)
        sides[BASE] = lambda n: run_engine(Engine(host, ""), every, counts, n)[0]
        sides[ADAPTER] = lambda n: run_engine(engine, every, counts, n)[0]
        if args.vllm and device.type == "cpu":
            job = {"model": str(folder), "dtype": str(dtype).removeprefix("torch.")}
            job |= {"prompts": prompts, "repeats": args.repeats, "tokens": args.tokens}
            name = stack.enter_context(tempfile.TemporaryDirectory())
            try:
                vllm = Side("verl-vllm-cpu", "decode_vllm.py", job, Path(name))
                stack.callback(vllm.close)
                sides["vLLM"] = lambda _: vllm()["seconds"]
            except RuntimeError as error:
                print(error, file=sys.stderr)
        if args.generate:
            plain = hf_generate(folder, prompts, args.repeats, dtype, device)
            there(lambda: plain(2))
            sides["generate"] = lambda _: there(lambda: plain(args.tokens))
        for number in range(1, args.rounds + 1):
            row: dict[str, Any] = {"round": number}
            for name, run in sides.items():
                row[f"{name} tokens/s"] = total / run(number)
            rate = there(lambda: matmul_rate(dtype, device))
            row |= {"GFLOP/s": rate / 1e9, "limit tokens/s": rate / (2 * parameters)}
            report.row(SIDES, row)
    conclude(report, [*sides])


def conclude(report: Report, sides: Sequence[str]) -> None:
    rows = report.rows(SIDES)

    def ratio(name: str, other: str) -> float:
        return median(
            float(row[f"{name} tokens/s"] or 0) / float(row[f"{other} tokens/s"] or 1)
            for row in rows
        )

    for side, what in ((BASE, "decoding"), (ADAPTER, "decoding with a LoRA adapter")):
        rate = median(float(row[f"{side} tokens/s"] or 0) for row in rows)
        report.figure(SIDES, f"{what}, tokens/s", rate)
        for name, wanted in (("generate", "at least 2.5"), ("vLLM", "at least 2")):
            if name in sides:
                faster = ratio(side, name)
                report.figure(SIDES, f"{what}, times faster than {name}", faster, wanted)
        share = 100 * ratio(side, "limit")
        report.figure(SIDES, f"{what}, % of the arithmetic limit", share, "at least 45")


# ---------------------------------------------------------------- lengths, turns


def lengths(engine: Engine, args: argparse.Namespace, report: Report) -> None:
    count = args.waves * args.prompts * args.repeats
    varied = np.linspace(4, args.tokens, count).round().astype(int)
    np.random.default_rng(0).shuffle(varied)
    same = np.full(count, varied.sum() // count)
    prompts = chat_prompts(engine.host, args.prompts)
    every = [prompts[i % len(prompts)] for i in range(count)]
    for number in range(1, args.rounds + 1):
        uniform, _ = run_engine(engine, every, same.tolist(), 100 + number)
        mixed, _ = run_engine(engine, every, varied.tolist(), 200 + number)
        rates = int(same.sum()) / uniform, int(varied.sum()) / mixed
        report.row(
            LENGTHS,
            {
                "round": number,
                f"all {same[0]}: tokens/s": rates[0],
                f"4 to {args.tokens}: tokens/s": rates[1],
                "%": 100 * rates[1] / rates[0],
            },
        )
    share = median(float(row["%"] or 0) for row in report.rows(LENGTHS))
    report.figure(LENGTHS, "lengths 4 to 64, % of the rate at one length", share, "at least 80")


def turns(engine: Engine, report: Report) -> None:
    host = engine.host
    rng = np.random.default_rng(1)

    def new(tokens: int) -> list[int]:
        return rng.integers(100, len(host.tokenizer) - 100, tokens).tolist()

    talks = [new(TURN_NEW) for _ in range(8)]
    counts = [TURN_SAMPLED] * len(talks)
    ratio = 0.0
    for turn in range(1, NUM_TURNS + 1):
        before = host.stats()
        seconds, done = run_engine(engine, talks, counts, turn)
        prefilled = host.stats().prefilled_tokens - before.prefilled_tokens
        unseen, _ = run_engine(engine, [new(len(ids)) for ids in talks], counts, turn)
        prompt = sum(map(len, talks))
        given = TURN_NEW * len(talks)
        ratio = prefilled / given
        report.row(
            TURNS,
            {
                "turn": turn,
                "prompt tokens": prompt,
                "new": given,
                "prefilled": prefilled,
                "prefilled / prompt": prefilled / prompt,
                "prefilled / new": ratio,
                "s": seconds,
                "s if never seen": unseen,
            },
        )
        talks = [
            [*ids, *answer.token_ids.tolist(), *new(TURN_NEW)]
            for ids, answer in zip(talks, done, strict=True)
        ]
    report.figure(TURNS, "turn 5: prefilled / new tokens", ratio, "under 1.1")


def main() -> None:
    args = arguments()
    if args.vllm and "sides" in args.parts:
        build("verl-vllm-cpu")
    report = Report("decode", __doc__, write=args.write)
    folder = resolve_model(args.model)
    print("Loading the model, and warming up.", file=sys.stderr, flush=True)
    host = EmbeddedHost.open(folder, max_num_seqs=args.prompts * args.repeats, dtype=args.dtype)
    engine = under_an_adapter(host)
    for either in (Engine(host, ""), engine):  # warm up
        run_engine(either, chat_prompts(host, args.prompts), [4] * args.prompts, 0)
    if "turns" in args.parts:
        turns(engine, report)
    if "lengths" in args.parts:
        lengths(engine, args, report)
    if "sides" in args.parts:
        side_by_side(engine, folder, args, report)
    host.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = ["turns", "lengths", "sides"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--waves", type=int, default=6, help="sequences for each place")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-generate", dest="generate", action="store_false")
    parser.add_argument("--no-vllm", dest="vllm", action="store_false")
    parser.add_argument("--write", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
