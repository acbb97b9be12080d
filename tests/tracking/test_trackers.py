"""The trackers' own packages, offline. Each is skipped where its package is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from astuner.tracking.trackers import _flat

SCRIPT = """
import sys
from pathlib import Path
from astuner.tracking import MetricSinks
name, run_dir, resume = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
sinks = MetricSinks([name], run_dir, "project", "run", {"a": {"b": 1}},
                    resume_step=int(resume) if resume else None)
sinks.log(1 if not resume else 2, {"reward/mean": 0.25})
assert list(sinks._sinks) == [name], "the tracker was left out"
sinks.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio", "mlflow"])
def test_works_offline_and_goes_on_after_a_resume(name: str, tmp_path: Path) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    offline = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "SWANLAB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    ids: list[str] = []
    for resume in ("", "1"):
        command = [sys.executable, "-c", SCRIPT, name, str(tmp_path), resume]
        done = subprocess.run(
            command, timeout=110, env=os.environ | offline, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        ids.append((tmp_path / "trackers" / name).read_text())
    assert ids[0] == ids[1]


def test_nested_config_becomes_dotted_keys() -> None:
    assert _flat({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": "x"}) == {
        "a.b": 1,
        "a.c.d": [1, 2],
        "e": "x",
    }
