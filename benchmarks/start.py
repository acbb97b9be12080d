"""Seconds from a command to what one waits for: the help text, one's own code, the first step.

    python benchmarks/start.py [--runs 5] [--write]

Measures, each as a process of its own, the median of several after one that warms the disk's
cache: `astuner --help` to its end; the debug backbone with the fake engine to the first line of
the user's workflow; and the quickstart to the first line of its workflow (which is already the
validation before training), to the beginning of the first training step, after that validation,
and to the step's end.

Does not show: a first start ever, with the model still to be fetched and nothing in the disk's
cache; larger models, whose loading is most of it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from astuner import ModelTuner, WorkflowOutput, WorkflowTask
from tutorial.example_arithmetic.arithmetic_agent import ArithmeticWorkflow

TABLE = "Seconds"
FIRST_LINE = "ASTUNER_BENCH_FIRST_LINE"
WANTED = {
    "astuner --help": "under 0.3",
    "debug with the fake engine to the user's first line": "under 3",
    "quickstart to the first step": "under 20",
}
DEADLINE = 300.0


class FirstLine(ArithmeticWorkflow):
    """The quickstart's workflow, which notes when it was called first."""

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        path = Path(os.environ[FIRST_LINE])
        if not path.exists():
            path.write_text(str(time.time()))
        return await super().execute(workflow_task, tuner)


# ---------------------------------------------------------------- measuring


def command(*arguments: str) -> list[str]:
    """The installed command, or the module where it is not installed."""
    script = Path(sys.executable).with_name("astuner")
    program = [str(script)] if script.exists() else [sys.executable, "-m", "astuner.cli"]
    return [*program, *arguments]


def show_help() -> dict[str, float]:
    begun = time.time()
    subprocess.run(command("--help"), check=True, stdout=subprocess.DEVNULL)
    return {"astuner --help": time.time() - begun}


def tune(folder: Path, *overrides: str) -> tuple[float, subprocess.Popen[Any], Path]:
    """When it was begun, the process, and where the workflow's first line is noted."""
    from record import ROOT

    first = folder / "first-line"
    arguments = ["--conf", "configs/quickstart.yaml", "--exp-dir", str(folder), *overrides]
    arguments += ["rollout.user_workflow=benchmarks.start->FirstLine"]
    environment = os.environ | {
        FIRST_LINE: str(first),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    begun = time.time()
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    return begun, process, first


def debug() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="astuner-bench-") as folder:
        begun, process, first = tune(
            Path(folder), "--backbone", "debug", "debug.model=fake", "debug.debug_first_n_tasks=1"
        )
        if process.wait(DEADLINE):
            raise RuntimeError(f"The debug run ended with {process.returncode}.")
        seconds = float(first.read_text()) - begun
    return {"debug with the fake engine to the user's first line": seconds}


def quickstart(model: str) -> dict[str, float]:
    from astuner.tracking import read_metrics

    with tempfile.TemporaryDirectory(prefix="astuner-bench-") as folder:
        begun, process, first = tune(Path(folder), f"model.path={model}")
        metrics = Path(folder) / "quickstart" / "metrics.jsonl"
        step: dict[str, float] = {}
        try:
            while "seconds/step" not in step:
                if process.poll() is not None or time.time() - begun > DEADLINE:
                    raise RuntimeError("The quickstart did not come to its first step.")
                time.sleep(0.1)
                step = read_metrics(metrics).get(1, {}) if metrics.exists() else {}
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        ended = step["time"] - begun
        return {
            "quickstart to the user's first line": float(first.read_text()) - begun,
            "quickstart to the first step": ended - step["seconds/step"],
            "quickstart to the first step's end": ended,
        }


def main() -> None:
    from record import Report

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    report = Report("start", __doc__, write=args.write)
    for measure in (show_help, debug, lambda: quickstart(args.model)):
        measure()
        runs = [measure() for _ in range(args.runs)]
        for name in runs[0]:
            seconds = [run[name] for run in runs]
            row = {"": name, "median": median(seconds), "least": min(seconds), "most": max(seconds)}
            report.row(TABLE, row)
            if name in WANTED:
                report.figure(TABLE, f"seconds, {name}", median(seconds), WANTED[name])


if __name__ == "__main__":
    main()
