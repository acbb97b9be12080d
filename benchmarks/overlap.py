"""Rollouts that go on during training, against taking turns, where the environment is slow.

    python benchmarks/overlap.py [--latencies 50 500] [--staleness 0 1 2] [--steps 10] [--write]

Compares `rollout.max_staleness` 0 (rollout and training take turns), 1 and 2 on the quickstart's
questions, in episodes of three turns: an answer, then twice "are you sure?", each after the
environment has taken so many ms (asleep: no processor time). 8 questions x 4 repeats a step.
The reward is the share of digits in the last answer: it differs between the episodes of every
group from the first step on, so that every step trains. Everything else is the same. Seconds
a step are medians without the first two; the reward is the mean over the steps near the number
of sampled tokens that every run of the latency reached.

Does not show: an environment that computes on the same cores (nothing can overlap with it),
a GPU, or what staleness does to a long run: this many steps are the beginning of one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask

TURNS = 3
LATENCY = "ASTUNER_BENCH_LATENCY_MS"
NEAR = 3
"""Steps whose rewards are averaged."""
TABLE = "Seconds a step and reward"


class SlowArithmetic(Workflow):
    """The quickstart's agent in an environment that takes its time each turn."""

    name: str = "slow_arithmetic"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        messages: list[Any] = [{"role": "user", "content": workflow_task.main_query}]
        answer = ""
        for turn in range(TURNS):
            reply = await client.chat.completions.create(model="tuned", messages=messages)
            answer = reply.choices[0].message.content or ""
            await asyncio.sleep(float(os.environ[LATENCY]) / 1000)
            messages.append({"role": "assistant", "content": answer})
            if turn < TURNS - 1:
                messages.append({"role": "user", "content": "Are you sure? Just the number."})
        return WorkflowOutput(reward=sum(map(str.isdigit, answer)) / max(len(answer), 1))


# ---------------------------------------------------------------- measuring


def run(latency: int, staleness: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """One run of the command; the metrics of its steps."""
    from record import ROOT

    from astuner.tracking import read_metrics

    with tempfile.TemporaryDirectory(prefix="astuner-bench-") as folder:
        command = [sys.executable, "-m", "astuner.cli", "--conf", "configs/quickstart.yaml"]
        command += ["--exp-dir", folder, f"model.path={args.model}"]
        command += [
            "data.max_response_length=512",
            f"data.train_batch_size={args.prompts}",
            f"rollout.num_repeat={args.repeats}",
            "rollout.user_workflow=benchmarks.overlap->SlowArithmetic",
            f"rollout.max_staleness={staleness}",
            "task_judge.judge_type=none",
            "rollout.val_kwargs.max_tasks=1",
            "trainer_common.val_before_train=false",
            "trainer_common.test_freq=0",
            "trainer_common.save_freq=0",
            "trainer_common.resume_freq=0",
            "trainer_common.optim.lr_schedule=constant",
            f"trainer_common.total_steps={args.steps}",
        ]
        environment = os.environ | {LATENCY: str(latency)}
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=environment)
        metrics = read_metrics(Path(folder) / "quickstart" / "metrics.jsonl")
    return [step for step in metrics.values() if "seconds/step" in step]


def reward_at(tokens: float, steps: list[dict[str, float]]) -> float:
    """The mean over the last few steps that begin before so many tokens were sampled."""
    before = [s for s in steps if s["total/tokens_sampled"] - s["tokens/sampled"] < tokens]
    return mean(step["reward/mean"] for step in before[-NEAR:] if "reward/mean" in step)


def measure(latency: int, args: argparse.Namespace, report: Any) -> None:
    runs = {staleness: run(latency, staleness, args) for staleness in args.staleness}
    tokens = min(steps[-1]["total/tokens_sampled"] for steps in runs.values())
    seconds = {k: median(s["seconds/step"] for s in v[2:] or v) for k, v in runs.items()}
    first = args.staleness[0]
    for staleness, steps in runs.items():
        report.row(
            TABLE,
            {
                "ms a turn": latency,
                "max_staleness": staleness,
                "s/step": seconds[staleness],
                "of it rollout": median(s["seconds/rollout"] for s in steps[2:] or steps),
                "train": median(s.get("seconds/train", 0.0) for s in steps[2:] or steps),
                "times faster": seconds[first] / seconds[staleness],
                "mean staleness": mean(s.get("staleness/mean", 0.0) for s in steps),
                "tokens": int(tokens),
                "reward there": reward_at(tokens, steps),
            },
        )
        if staleness != first:
            name = f"overlap at {latency} ms a turn, staleness {staleness}: times faster"
            report.figure(TABLE, name, seconds[first] / seconds[staleness])


def main() -> None:
    from record import Report

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--latencies", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    report = Report("overlap", __doc__, write=args.write)
    for latency in args.latencies:
        measure(latency, args, report)


if __name__ == "__main__":
    main()
