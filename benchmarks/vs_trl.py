"""One GRPO step of the quickstart's task, by astuner and by TRL's GRPOTrainer.

    python benchmarks/vs_trl.py --part short [--write]    # answers of up to 8 tokens
    python benchmarks/vs_trl.py --part long [--write]     # up to 64
    python benchmarks/vs_trl.py --part turns [--write]    # five turns of up to 8

Compares, with the same model, questions, batch (8 prompts x 16 repeats; five turns: x 4) and
settings (LoRA of rank 16 on all linear layers, bfloat16, lr 3e-4, group-normalised
advantages, no KL, one update a batch), the seconds from the first token sampled to the
weights updated. astuner is its own command with everything a run does in a step: workflows
over the in-process client, recording, merging, publishing. TRL runs on the CPU in an
environment of its own (requirements/trl.txt) with what makes it faster there: no gradient
checkpointing, micro-batches of `--micro-batch` samples. Its five turns are its own
`rollout_func`, with what was not sampled masked. A reward without meaning, different for every
answer, lets both train on all groups. The two take turns in one run; the other one waits.

Each round is an astuner run (its first step not counted, the median of the others) and a TRL
step; rounds begin as long as there is time for another one in `--minutes`. The figure is the
median of the rounds' ratios. Both have sampled and trained a little before.

Does not show: TRL with vLLM or on a GPU, which it is made for; what is learnt; time to load.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from record import ROOT, Report
from vs_trl_agent import FOLLOW_UPS
from waiting import Side, build

from astuner.config.load import load_config
from astuner.engine.model_source import resolve_model
from astuner.task_reader import read_tasks
from astuner.tracking import read_metrics

CONF = "configs/quickstart.yaml"
MAX_STEPS = 50


@dataclass(frozen=True)
class Part:
    table: str
    repeats: int
    max_tokens: int
    follow_ups: tuple[str, ...] = ()
    wanted: str = ""

    @property
    def workflow(self) -> str:
        return "FiveTurns" if self.follow_ups else "OneTurn"


PARTS = {
    "short": Part("Answers of up to 8 tokens", 16, 8, wanted="at least 15"),
    "long": Part("Answers of up to 64 tokens", 16, 64),
    "turns": Part("Five turns of up to 8 tokens", 4, 8, FOLLOW_UPS),
}


def astuner_steps(part: Part, args: argparse.Namespace, seed: int) -> list[dict[str, float]]:
    """One run of its command; the metrics of its steps but the first."""
    with tempfile.TemporaryDirectory(prefix="astuner-bench-") as folder:
        command = [sys.executable, "-m", "astuner.cli", "--conf", CONF, "--exp-dir", folder]
        command += [
            f"seed={seed}",
            f"model.path={args.model}",
            f"model.dtype={args.dtype}",
            f"data.train_batch_size={args.prompts}",
            "data.max_response_length=512",
            f"rollout.user_workflow=benchmarks.vs_trl_agent->{part.workflow}",
            f"rollout.num_repeat={part.repeats}",
            f"rollout.max_response_length_in_one_turn={part.max_tokens}",
            "rollout.val_kwargs.max_tasks=1",
            "task_judge.judge_type=none",
            "trainer_common.val_before_train=false",
            "trainer_common.test_freq=0",
            "trainer_common.save_freq=0",
            "trainer_common.resume_freq=0",
            "trainer_common.optim.lr_schedule=constant",
            f"trainer_common.total_steps={args.steps + 1}",
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        metrics = read_metrics(Path(folder) / "quickstart" / "metrics.jsonl")
    return [step for step in metrics.values() if "seconds/step" in step][1:]


def job(part: Part, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = load_config(ROOT / CONF).config
    tasks = read_tasks(config.task_reader, config.seed).train
    return {
        "model": str(resolve_model(args.model)),
        "folder": str(folder),
        "bf16": args.dtype != "float32",
        "prompts": args.prompts,
        "repeats": part.repeats,
        "micro_batch": args.micro_batch,
        "max_tokens": part.max_tokens,
        "follow_ups": list(part.follow_ups),
        "steps": MAX_STEPS,
        "questions": [task.main_query for task in tasks],
    }


def measure(part: Part, args: argparse.Namespace, report: Report) -> None:
    ratios: list[float] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="astuner-trl-")))
        begun = time.monotonic()
        trl = Side("trl", "vs_trl_worker.py", job(part, args, folder), folder)
        stack.callback(trl.close)
        longest = 0.0
        for number in range(args.rounds):
            started = time.monotonic()
            if number and started - begun + longest > args.minutes * 60:
                break
            steps = astuner_steps(part, args, seed=number)
            ours = [step["seconds/step"] for step in steps]
            theirs = trl()
            ratios.append(theirs["seconds"] / median(ours))
            report.row(
                part.table,
                {
                    "round": number + 1,
                    "astuner s": median(ours),
                    "of it rollout": median(step["seconds/rollout"] for step in steps),
                    "train": median(step["seconds/train"] for step in steps),
                    "sampled": median(step["tokens/sampled"] for step in steps),
                    "TRL s": theirs["seconds"],
                    "TRL sampled": theirs["sampled"],
                    "times faster": ratios[-1],
                },
            )
            longest = max(longest, time.monotonic() - started)
    name = f"times faster than TRL: {part.table[0].lower()}{part.table[1:]}"
    report.figure(part.table, name, median(ratios), part.wanted)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, default="short")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--steps", type=int, default=2, help="of astuner, a round")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--micro-batch", type=int, default=32, help="TRL's samples at once")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    build("trl")
    measure(PARTS[args.part], args, Report("vs_trl", __doc__, write=args.write))


if __name__ == "__main__":
    main()
