"""The quickstart's agent, data and judge on two backbones: reward, seconds, tokens.

    python benchmarks/backbones.py [--steps 10] [--backbones local verl] [--write]

Runs `configs/quickstart.yaml` once a backbone, one after the other, each in its own
environment (verl's is made by scripts/install.py), all of them on the CPU, in float32 and
with the same few changes: see SAME. s/step and its parts are medians without the first step;
the whole command includes loading, validation, and with verl starting Ray and its processes.
For tinker an `astuner serve` of the same model is started beside the run and ended with it.
It does not show how fast verl is: on the CPU it does the same, and is made for GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from record import ROOT, Report

from astuner.tracking import read_metrics

INSTALL = [sys.executable, str(ROOT / "scripts" / "install.py"), "--env"]
ENVIRONMENTS = {"local": None, "tinker": None, "verl": "verl"}
SAME = {
    "model.dtype": "float32",
    "model.device": "cpu",
    "data.train_batch_size": 4,
    "rollout.num_repeat": 8,
    "rollout.val_kwargs.max_tasks": 32,
    "trainer_common.optim.lr_schedule": "constant",  # verl has no linear one
    "trainer_common.test_freq": 0,
    "trainer_common.save_freq": 0,
    "trainer_common.resume_freq": 0,
}
SERVICE_SECONDS = 300.0
"""For the service of tinker to load its model."""
RUNS, REWARDS = "The runs", "Mean reward of each step"


@dataclass(frozen=True)
class Run:
    """What one backbone left behind."""

    backbone: str
    whole_seconds: float
    summary: dict[str, Any]
    steps: list[dict[str, float]]
    """Metrics of the steps that trained, in their order."""


def run(backbone: str, overrides: list[str], model: str, timeout: float) -> Run:
    """One run in the backbone's own environment. Raises CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory(prefix="astuner-bench-") as folder, ExitStack() as stack:
        command = [*_python_of(backbone), "-m", "astuner.cli", "--conf", "configs/quickstart.yaml"]
        command += ["--backbone", backbone, "--exp-dir", folder, f"model.path={model}", *overrides]
        environment = dict(os.environ)
        if backbone == "tinker":
            url, key = stack.enter_context(service(model, Path(folder) / "service"))
            command += [f"service.base_url={url}"]
            environment["TINKER_API_KEY"] = key
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=timeout)
        seconds = time.monotonic() - started
        run_dir = Path(folder) / "quickstart"
        summary = json.loads((run_dir / "summary.json").read_text())
        metrics = read_metrics(run_dir / "metrics.jsonl")
    return Run(backbone, seconds, summary, [m for m in metrics.values() if "reward/mean" in m])


@contextmanager
def service(model: str, folder: Path) -> Iterator[tuple[str, str]]:
    """`astuner serve` on a free port; gives its address and key, and ends it by its pid."""
    folder.mkdir()
    log = folder / "log"
    command = [sys.executable, "-m", "astuner.cli", "serve", "--model", model, "port=0"]
    command += [f"data_dir={folder}", "model.device=cpu", "model.dtype=float32"]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + SERVICE_SECONDS
        while not (found := re.search(r"Serving .* at (http://\S+) for", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"astuner serve did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield found[1], (folder / "api-key").read_text().strip()
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _python_of(backbone: str) -> list[str]:
    """How to run this checkout with what the backbone needs."""
    name = ENVIRONMENTS[backbone]
    return [sys.executable] if name is None else [*INSTALL, name, "--", "python"]


def row(run: Run) -> dict[str, Any]:
    """The first step is left out of the medians: it waits for what is loaded or compiled."""
    steps = run.steps[1:] or run.steps

    def seconds(name: str) -> float:
        return median(step.get(f"seconds/{name}", 0.0) for step in steps)

    before, after = (run.summary[name] for name in ("eval_before", "eval_after"))
    return {
        "backbone": run.backbone,
        "steps": run.summary["steps"],
        "s/step": seconds("step"),
        "rollout s": seconds("rollout"),
        "train s": seconds("train"),
        "publish s": seconds("publish"),
        "whole command s": run.whole_seconds,
        "sampled": run.summary["tokens_sampled"],
        "trained": run.summary["tokens_trained"],
        "held out before": before,
        "after": after,
    }


def rewards(runs: list[Run], report: Report) -> None:
    for at in range(max(len(run.steps) for run in runs)):
        known = {r.backbone: r.steps[at]["reward/mean"] for r in runs if at < len(r.steps)}
        report.row(REWARDS, {"step": at + 1, **known})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", choices=ENVIRONMENTS, default=[*ENVIRONMENTS])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one backbone")
    parser.add_argument("--write", action="store_true", help="keep the figures")
    parser.add_argument("overrides", nargs="*", help="key=value, for all backbones")
    args = parser.parse_args()
    overrides = [f"{name}={value}" for name, value in SAME.items()]
    overrides += [f"trainer_common.total_steps={args.steps}", *args.overrides]
    for backbone in args.backbones:
        if name := ENVIRONMENTS[backbone]:  # its building is no part of the figures
            subprocess.run([*INSTALL, name], check=True, stdout=subprocess.DEVNULL)
    report = Report("backbones", __doc__, write=args.write)
    runs: list[Run] = []
    for backbone in args.backbones:
        print(f"--- {backbone}", flush=True)
        runs.append(run(backbone, overrides, args.model, args.timeout))
        report.row(RUNS, row(runs[-1]))
    rewards(runs, report)


if __name__ == "__main__":
    main()
