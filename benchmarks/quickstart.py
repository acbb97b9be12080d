"""The quickstart as a user runs it: held-out accuracy before and after, and seconds.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--markdown]

Runs `astuner --conf configs/quickstart.yaml` once a seed, in a process of its own and
a temporary run folder, and prints a row each. `--markdown` prints what
benchmarks/results/quickstart.md holds. Nothing else should compute meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("seed", "before", "after", "steps", "train s", "total s", "s/step", "sampled", "trained")


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


def row(summary: dict[str, Any]) -> list[str]:
    train = summary["train_seconds"]
    return [
        str(summary["seed"]),
        f"{summary['eval_before']:.3f}",
        f"{summary['eval_after']:.3f}",
        str(summary["steps"]),
        f"{train:.0f}",
        f"{summary['total_seconds']:.0f}",
        f"{train / summary['steps']:.2f}",
        str(summary["tokens_sampled"]),
        str(summary["tokens_trained"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    edge, between = ("| ", " | ") if args.markdown else ("", "\t")
    print(edge + between.join(COLUMNS))
    if args.markdown:
        print("|" + "---|" * len(COLUMNS))
    for seed in args.seeds:
        print(edge + between.join(row(run(seed))), flush=True)


if __name__ == "__main__":
    main()
