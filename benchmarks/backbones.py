"""The quickstart's agent, data and judge on two backbones: reward, seconds, tokens.

    python benchmarks/backbones.py [--steps 10] [--backbones local verl] [--write]

Runs `configs/quickstart.yaml` once a backbone, one after the other, each in its own
environment (verl's is made by scripts/install.py), all of them on the CPU, in float32 and
with the same few changes: see SAME. Runs show their own progress; then comes one table, and
the rewards of each step. `--write` puts both, with commit and machine, into
benchmarks/results/backbones.md. Nothing else should compute meanwhile. For tinker an
`astuner serve` of the same model is started beside the run and ended with it. On the CPU verl shows
that it does the same, not how fast it is: it is made for GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from astuner.tracking import read_metrics

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "backbones.md"
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
COLUMNS = (
    "backbone", "steps", "s/step", "rollout s", "train s", "publish s",
    "whole command s", "sampled", "trained", "held out before", "after",
)  # fmt: skip


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


def row(run: Run) -> list[str]:
    """The first step is left out of the medians: it waits for what is loaded or compiled."""
    steps = run.steps[1:] or run.steps

    def seconds(*names: str) -> str:
        found = [sum(step[name] for name in names if name in step) for step in steps]
        return f"{median(found):.1f}"

    before, after = (run.summary[name] for name in ("eval_before", "eval_after"))
    return [
        run.backbone,
        str(run.summary["steps"]),
        seconds("seconds/step"),
        seconds("seconds/rollout"),
        seconds("seconds/train"),
        seconds("seconds/publish"),
        f"{run.whole_seconds:.0f}",
        str(run.summary["tokens_sampled"]),
        str(run.summary["tokens_trained"]),
        *("-" if score is None else f"{score:.3f}" for score in (before, after)),
    ]


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def rewards(runs: list[Run]) -> str:
    """Mean reward of each step, a column a backbone."""
    count = max(len(run.steps) for run in runs)
    rows = [
        [str(at + 1)]
        + [f"{r.steps[at]['reward/mean']:.3f}" if at < len(r.steps) else "-" for r in runs]
        for at in range(count)
    ]
    return table(("step", *(run.backbone for run in runs)), rows)


def page(runs: list[Run], command: str) -> str:
    changes = ", ".join(f"{name}={value}" for name, value in SAME.items())
    return (
        f"# Backbones\n\n`{command}` at commit {_commit()} on {_machine()}.\n\n"
        f"`configs/quickstart.yaml` with the same changes for all: {changes}. s/step and its parts "
        "are medians without the first step; the whole command includes loading, validation, "
        "and with verl starting Ray and its processes.\n\n"
        f"{table(COLUMNS, [row(run) for run in runs])}\n\nMean reward of each step:\n\n"
        f"{rewards(runs)}\n"
    )


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{os.cpu_count()} cores of {models[0] if models else platform.processor() or 'unknown'}, "
        f"Python {platform.python_version()}, torch {metadata.version('torch')} (local's)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", choices=ENVIRONMENTS, default=[*ENVIRONMENTS])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one backbone")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("overrides", nargs="*", help="key=value, for all backbones")
    args = parser.parse_args()
    overrides = [f"{name}={value}" for name, value in SAME.items()]
    overrides += [f"trainer_common.total_steps={args.steps}", *args.overrides]
    for backbone in args.backbones:
        if name := ENVIRONMENTS[backbone]:  # its building is no part of the figures
            subprocess.run([*INSTALL, name], check=True, stdout=subprocess.DEVNULL)
    runs: list[Run] = []
    for backbone in args.backbones:
        print(f"--- {backbone}", flush=True)
        runs.append(run(backbone, overrides, args.model, args.timeout))
    text = page(runs, " ".join(["python benchmarks/backbones.py", *sys.argv[1:]]))
    print(text)
    if args.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
