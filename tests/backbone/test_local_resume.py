"""Kill a run and go on: it ends with the weights of a run that was not killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]


@contextmanager
def started(model: Path, runs: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a process of its own, which ends with the block."""
    command = [sys.executable, "-m", "tests.backbone.resumable", str(model), str(runs), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=30)


def ends(model: Path, runs: Path, *flags: str) -> int:
    """The exit code of a whole run."""
    with started(model, runs, *flags) as process:
        return process.wait(timeout=120)


def wait_for_step(runs: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    metrics = runs / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come")


def final(runs: Path) -> dict[str, bytes]:
    folder = runs / "tiny" / "checkpoints" / "checkpoint-000006"
    weights = load_file(folder / "adapter_model.safetensors")
    return {name: weight.tobytes() for name, weight in weights.items()}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sigkill_and_resume_end_with_the_same_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert ends(tiny_model_dir, whole) == 0
    with started(tiny_model_dir, killed) as process:
        wait_for_step(killed, 3, process)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert ends(tiny_model_dir, killed, "--resume") == 0
    assert final(killed) == final(whole)
    lines = (killed / "tiny" / "metrics.jsonl").read_text().splitlines()
    trained = [json.loads(line) for line in lines]
    assert sorted({line["step"] for line in trained}) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_saves_and_resume_goes_on(tiny_model_dir: Path, tmp_path: Path) -> None:
    with started(tiny_model_dir, tmp_path) as process:
        wait_for_step(tmp_path, 2, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["stopped"]
    assert 2 <= summary["steps"] < 6
    assert ends(tiny_model_dir, tmp_path, "--resume") == 0
    assert json.loads((tmp_path / "tiny" / "summary.json").read_text())["steps"] == 6
