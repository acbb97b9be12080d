"""verl's real processes, as a user treats them: stopped, killed, and stuck.

Each starts verl, which takes half a minute or more before the first step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from astuner.backbone.spawned.files import read_stage
from astuner.backbone.spawned.supervise import Child
from astuner.tracking import read_metrics

pytestmark = [
    pytest.mark.verl,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(sys.platform != "linux", reason="verl runs on Linux"),
]
SECONDS = 240.0
ACTOR = re.compile(r"ray::(?!DashboardAgent|RuntimeEnvAgent|IDLE)")
"""The title of a process that Ray started for somebody, and not for itself."""

LAUNCHER = """
import os
import sys
from pathlib import Path
from tests.tiny_run import EarlyLetters, tiny_job

if __name__ == "__main__":
    model, runs, steps = sys.argv[1:4]
    job = tiny_job(Path(model), Path(runs), EarlyLetters, total_steps=int(steps), test_freq=0)
    job.config.backbone = "verl"
    job.config.model.lora.enable = False
    job.config.trainer_common.device = "cpu"
    job.config.trainer_common.val_before_train = False
    job.config.trainer_common.stall_timeout = float(sys.argv[4])
    job.config.trainer_common.ray_address = os.environ.get("GIVEN_CLUSTER", "")
    job.tune(resume="--resume" in sys.argv)
"""
STUCK = """
import os, time
from astuner.backbone.verl_cpu.server import RolloutServer

update, updates = RolloutServer.update, []

async def update_or_hang(self, weights):
    updates.append(weights)
    if len(updates) == 3:  # those before training, those of step 1
        time.sleep(3600)
    return await update(self, weights)

RolloutServer.update = update_or_hang
"""


def eventually(true: Callable[[], bool], seconds: float = SECONDS) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


class Launcher:
    """A user's script in a process of its own."""

    def __init__(self, model: Path, runs: Path, *options: str, stall: float = 200) -> None:
        self.run = runs / "tiny"
        self.temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
        """Its own, with a short name: below it are Unix sockets."""
        script = runs / "script.py"
        script.write_text(LAUNCHER)
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(model), str(runs), "60", str(stall), *options],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([os.getcwd(), str(runs)]),
                "RAY_TMPDIR": str(self.temporary),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def trained(self, steps: int) -> bool:
        """Whether so many steps are done; the launcher must be alive until then."""
        assert self.process.poll() is None, self.output()
        metrics = self.run / "metrics.jsonl"
        return metrics.exists() and max(read_metrics(metrics), default=0) >= steps

    def output(self) -> str:
        """All that it said; only once it has ended."""
        assert self.process.stdout is not None
        said = self.process.stdout.read()
        log = self.run / "verl" / "verl.log"
        return said + (log.read_text()[-5000:] if log.exists() else "")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)
        shutil.rmtree(self.temporary, ignore_errors=True)


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def titles(processes: Sequence[psutil.Process]) -> list[str]:
    """Of those that run."""
    return [" ".join(p.cmdline()) for p in processes if not gone(p)]


def test_stopped_resumed_and_killed(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C saves the step; a resume goes on after it; SIGKILL of the launcher leaves no
    process of Ray or verl behind, and no temporary file."""
    with Launcher(tiny_model_dir, tmp_path) as first:
        assert eventually(lambda: first.trained(1)), first.run
        first.process.send_signal(signal.SIGINT)
        assert eventually(lambda: first.process.poll() is not None)
        assert first.process.returncode == 0, first.output()
        assert eventually(lambda: not list(first.temporary.iterdir()), 10)
    summary = json.loads((first.run / "summary.json").read_text())
    stopped_at = summary["steps"]
    assert summary["stopped"] and 1 <= stopped_at < 60
    assert summary["checkpoint"].endswith(f"global_step_{stopped_at}")
    assert (first.run / "model" / "config.json").exists()

    with Launcher(tiny_model_dir, tmp_path, "--resume") as second:
        assert eventually(lambda: second.trained(stopped_at + 1))
        assert list(read_metrics(second.run / "metrics.jsonl"))[:stopped_at] == [
            *range(1, stopped_at + 1)
        ]
        family = second.family()
        started = " ".join(titles(family))
        for one in ("raylet", "gcs_server", "WatchedTaskRunner", "AgentLoopWorker"):
            assert one in started
        second.process.kill()
        assert eventually(lambda: all(gone(p) for p in family), 60), titles(family)
        assert eventually(lambda: not list(second.temporary.iterdir()), 30)


def test_a_hung_weight_sync_ends_the_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "stuck"
    try:
        launcher = Launcher(tiny_model_dir, tmp_path, stall=60)
    finally:
        del os.environ["VERL_USE_EXTERNAL_MODULES"]
    with launcher:
        assert eventually(lambda: launcher.process.poll() is not None, 300)
        said = launcher.output()
    assert launcher.process.returncode == 1
    stage = read_stage(launcher.run / "verl")
    assert stage is not None and (stage.name, stage.step) == ("publish", 2)
    assert "DeadlineExceeded: verl has shown no sign of life for 1 min" in said
    assert "while publishing in step 2 of 60" in said
    assert "update_weights (" in said
    assert "Step 2 is saved: go on with --resume." in said


def test_a_given_cluster_is_joined_and_left_alone(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our actors in it end with us, its own processes stay."""
    port = free_port()
    here = ["--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    size = ["--num-gpus=1", "--num-cpus=16", "--object-store-memory=200000000"]
    quiet = ["--include-dashboard=false", "--disable-usage-stats"]
    ray = str(Path(sys.executable).with_name("ray"))
    monkeypatch.setenv("GIVEN_CLUSTER", f"127.0.0.1:{port}")
    command = [ray, "start", *here, *size, *quiet]
    with (
        Child(command, tmp_path / "cluster", log="ray.log") as cluster,
        Launcher(tiny_model_dir, tmp_path) as launcher,
    ):
        assert eventually(lambda: launcher.trained(1))
        actors = [p for p in below(cluster) if ACTOR.match(" ".join(p.cmdline()))]
        assert any("WatchedTaskRunner" in " ".join(p.cmdline()) for p in actors)
        family = launcher.family()
        launcher.process.kill()
        ours = [*family, *actors]
        assert eventually(lambda: all(gone(p) for p in ours), 60), titles(ours)
        assert cluster.ended() is None
        assert any("raylet" in p.name() for p in below(cluster))


def below(child: Child) -> list[psutil.Process]:
    return psutil.Process(child.pid).children(recursive=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
