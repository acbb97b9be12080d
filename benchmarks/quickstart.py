"""The quickstart as a user runs it: held-out accuracy before and after, and seconds.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--write]

Runs `astuner --conf configs/quickstart.yaml` once a seed, in a process of its own and
a temporary run folder: SmolLM2-135M-Instruct, LoRA of rank 16, 8 tasks x 16 repeats a step,
one-digit sums; the 64 held-out questions are in none of the 136 training questions; scored
greedily, a bare right number counts. `train s` is rollout, training, publishing and
checkpoints; `total s` the whole command. It does not show how other algorithms or models do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from record import Report

ROOT = Path(__file__).resolve().parent.parent
TABLE = "A run for each seed"


def run(seed: int) -> dict[str, Any]:
    """One quickstart; the figures of its summary and the wall time of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "astuner.cli", "--conf", "configs/quickstart.yaml"]
        command += ["--exp-dir", folder, f"seed={seed}"]
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        summary = json.loads((Path(folder) / "quickstart" / "summary.json").read_text())
    return summary | {"seed": seed, "total_seconds": seconds}


def row(summary: dict[str, Any]) -> dict[str, Any]:
    train = summary["train_seconds"]
    return {
        "seed": summary["seed"],
        "before": f"{summary['eval_before']:.3f}",
        "after": f"{summary['eval_after']:.3f}",
        "steps": summary["steps"],
        "train s": train,
        "total s": summary["total_seconds"],
        "s/step": train / summary["steps"],
        "sampled": summary["tokens_sampled"],
        "trained": summary["tokens_trained"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    report = Report("quickstart", __doc__, write=args.write)
    for seed in args.seeds:
        report.row(TABLE, row(run(seed)))
    for name, column in (("held-out accuracy after", "after"), ("seconds in all", "total s")):
        found = median(float(row[column] or 0) for row in report.rows(TABLE))
        report.figure(TABLE, f"quickstart, {name}", found)


if __name__ == "__main__":
    main()
