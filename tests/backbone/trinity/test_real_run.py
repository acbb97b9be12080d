"""Trinity's real processes over astuner's own service, on a tiny model.

Each run starts Ray, Trinity and a service, which takes half a minute or more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from astuner.tracking import read_episodes, read_metrics
from tests.tiny_run import EarlyLetters, tiny_job

pytestmark = [
    pytest.mark.trinity,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(sys.platform != "linux", reason="Trinity runs on Linux"),
]
SECONDS = 400.0
SCRIPT = str(Path(__file__).with_name("trinity_run.py"))


class Launcher:
    """A user's script in a process of its own."""

    def __init__(self, model: Path, runs: Path, workflow: str, steps: int, *options: str) -> None:
        self.run = runs / "tiny"
        self.log = (runs / "said").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, str(model), str(runs), workflow, str(steps), *options],
            env={**os.environ, "PYTHONPATH": _path(os.getcwd()), "RAY_TMPDIR": "/tmp"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def ends(self) -> str:
        """Wait for its end, and what it said."""
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"It does not end:\n{self.said()}")
        return self.said()

    def said(self) -> str:
        self.log.seek(0)
        said = self.log.read()
        log = self.run / "trinity" / "trinity.log"
        return said + (log.read_text(errors="replace")[-6000:] if log.exists() else "")

    def trained(self, steps: int) -> bool:
        """Whether so many steps are done; the launcher must be alive until then."""
        assert self.process.poll() is None, self.said()
        metrics = self.run / "metrics.jsonl"
        return metrics.exists() and max(read_metrics(metrics), default=0) >= steps

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)
        self.log.close()


def _path(first: str) -> str:
    return os.pathsep.join([first, *filter(None, [os.environ.get("PYTHONPATH", "")])])


def eventually(true: Callable[[], bool], seconds: float = SECONDS) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def mean(metrics: dict[int, dict[str, float]], name: str, steps: Sequence[int]) -> float:
    return float(np.mean([metrics[step][name] for step in steps]))


def locally(model: Path, runs: Path, steps: int) -> dict[int, dict[str, float]]:
    """The metrics of the same run with the local backbone."""
    job = tiny_job(model, runs, EarlyLetters, total_steps=steps, test_freq=0)
    job.config.rollout.num_repeat, job.config.rollout.max_staleness = 8, 0
    job.config.trainer_common.optim.lr = 0.03
    job.tune()
    return read_metrics(runs / "tiny" / "metrics.jsonl")


def test_the_same_run_as_local_then_resumed(tiny_model_dir: Path, tmp_path: Path) -> None:
    """In turns, so that all is on-policy: episodes and updates are those of the local backbone.
    Then two more steps of the same run."""
    options = [
        "rollout.mode=sync",
        "rollout.num_repeat=8",
        "trainer_common.optim.lr=0.03",
        "trainer_common.test_freq=0",
    ]
    with Launcher(tiny_model_dir, tmp_path, "EarlyLetters", 14, *options) as launcher:
        said = launcher.ends()
    assert launcher.process.returncode == 0, said
    metrics = read_metrics(launcher.run / "metrics.jsonl")
    assert list(metrics) == list(range(15))
    (tmp_path / "local").mkdir()
    local = locally(tiny_model_dir, tmp_path / "local", 3)
    for step in (1, 2, 3):
        assert metrics[step]["reward/mean"] == pytest.approx(local[step]["reward/mean"], abs=1e-6)
        grad_norms = [m[step]["policy/grad_norm"] for m in (metrics, local)]
        assert grad_norms[0] == pytest.approx(grad_norms[1], rel=1e-3)
    rising = [mean(metrics, "reward/mean", steps) for steps in ((1, 2, 3, 4), range(9, 15))]
    assert rising[1] > rising[0] + 0.03, rising
    for step in range(1, 15):
        assert abs(metrics[step]["policy/ppo_kl"]) < 1e-6
        assert metrics[step]["policy/logprob_gap"] < 1e-5
        assert metrics[step]["staleness/max"] == 0
        assert metrics[step]["groups/total"] == 2
        assert max(0, metrics[step]["trinity/sample/model_version/min"]) == step - 1
    summary = json.loads((launcher.run / "summary.json").read_text())
    assert (summary["steps"], summary["stopped"], summary["episodes"]) == (14, False, 14 * 16)
    assert summary["eval_after"] > summary["eval_before"]
    assert (launcher.run / "model" / "adapter_model.safetensors").exists()

    with Launcher(tiny_model_dir, tmp_path, "EarlyLetters", 16, *options, "--resume") as launcher:
        said = launcher.ends()
    assert launcher.process.returncode == 0, said
    assert "after step 14" in said
    metrics = read_metrics(launcher.run / "metrics.jsonl")
    assert list(metrics) == list(range(17))
    for step in (15, 16):  # sampled with the resumed weights, and with those that followed
        assert metrics[step]["staleness/max"] == 0
        assert abs(metrics[step]["policy/ppo_kl"]) < 1e-6
        assert metrics[step]["policy/logprob_gap"] < 1e-5
    rows = [r for r in read_episodes(launcher.run).to_pylist() if r["split"] == "train"]
    assert sorted(r["step"] for r in rows) == [step for step in range(1, 17) for _ in range(16)]
    for row in rows:
        assert {v for v in row["weight_versions"] if v >= 0} == {row["step"] - 1}


@pytest.mark.slow
def test_failed_episodes_while_rollouts_run_ahead(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Rollouts run ahead, every second episode fails, and the steps are all trained."""
    options = ["trainer_common.val_before_train=false", "trainer_common.test_freq=0"]
    with Launcher(tiny_model_dir, tmp_path, "FailsSometimes", 3, *options) as launcher:
        said = launcher.ends()
    assert launcher.process.returncode == 0, said
    metrics = read_metrics(launcher.run / "metrics.jsonl")
    assert [metrics[s]["episodes/failed"] for s in (1, 2, 3)] == [4.0, 4.0, 4.0]
    assert [metrics[s]["groups/total"] for s in (1, 2, 3)] == [2.0, 2.0, 2.0]
    assert max(metrics[s]["staleness/max"] for s in (1, 2, 3)) <= 1


@pytest.mark.slow
def test_nothing_outlives_a_killed_launcher(tiny_model_dir: Path, tmp_path: Path) -> None:
    with Launcher(tiny_model_dir, tmp_path, "EarlyLetters", 500) as launcher:
        assert eventually(lambda: launcher.trained(1)), launcher.said()
        family = launcher.family()
        titles = " ".join(" ".join(p.cmdline()) for p in family if not gone(p))
        assert "raylet" in titles and "astuner.cli serve" in titles
        launcher.process.send_signal(signal.SIGKILL)
        assert eventually(lambda: all(gone(p) for p in family), 60), [
            p.cmdline() for p in family if not gone(p)
        ]


@pytest.mark.slow
def test_ctrl_c_ends_after_the_step_and_saves_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    with Launcher(tiny_model_dir, tmp_path, "EarlyLetters", 500) as launcher:
        assert eventually(lambda: launcher.trained(2)), launcher.said()
        launcher.process.send_signal(signal.SIGINT)
        said = launcher.ends()
    assert launcher.process.returncode == 0, said
    summary = json.loads((launcher.run / "summary.json").read_text())
    assert summary["stopped"] and 2 <= summary["steps"] < 500
    assert summary["checkpoint"].endswith(f"global_step_{summary['steps']}")
    assert "--resume" in said
