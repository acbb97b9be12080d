"""metrics.jsonl, the console line, and trackers that are missing, unknown or break."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from astuner.errors import ConfigError, MissingDependency
from astuner.tracking import MetricSinks, read_metrics
from astuner.tracking import sinks as sinks_module
from astuner.tracking.console import line


def make(run_dir: Path, *names: str, **options: Any) -> MetricSinks:
    return MetricSinks(names, run_dir, "project", "run", {"seed": 0}, **options)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_one_json_line_for_each_step(tmp_path: Path) -> None:
    sinks = make(tmp_path)
    sinks.log(1, {"reward/mean": 0.25, "policy/loss": float("nan")})
    sinks.log(2, {"reward/mean": 0.5, "policy/loss": -0.125})
    sinks.close()
    written = lines(tmp_path)
    assert all(row.pop("time") > 1e9 for row in written)
    assert written == [
        {"step": 1, "reward/mean": 0.25, "policy/loss": None},
        {"step": 2, "reward/mean": 0.5, "policy/loss": -0.125},
    ]


def test_lines_survive_sigkill(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from astuner.tracking import MetricSinks
sinks = MetricSinks([], Path({str(tmp_path)!r}), "p", "e", {{}})
sinks.log(1, {{"reward/mean": 0.5}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert [row["reward/mean"] for row in lines(tmp_path)] == [0.5]


def test_a_resumed_run_cuts_off_what_came_later(tmp_path: Path) -> None:
    sinks = make(tmp_path)
    for step in (1, 2, 3, 4):
        sinks.log(step, {"reward/mean": step / 10})
    sinks.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "torn')
    sinks = make(tmp_path, resume_step=2)
    sinks.log(3, {"reward/mean": 0.75})
    sinks.close()
    assert [(row["step"], row["reward/mean"]) for row in lines(tmp_path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.75),
    ]


def test_a_new_run_puts_the_old_file_aside(tmp_path: Path) -> None:
    first = make(tmp_path)
    first.log(1, {"reward/mean": 0.1})
    first.close()
    second = make(tmp_path)
    assert len(lines(tmp_path)) == 1  # untouched until there is something to log
    second.log(1, {"reward/mean": 0.9})
    second.close()
    assert [row["reward/mean"] for row in lines(tmp_path)] == [0.9]
    assert '"reward/mean": 0.1' in (tmp_path / "metrics.jsonl.old").read_text()


def test_reading_merges_the_lines_of_a_step(tmp_path: Path) -> None:
    sinks = make(tmp_path)
    sinks.log(0, {"eval/score": 0.0})
    sinks.log(1, {"reward/mean": 0.5, "policy/loss": float("inf")})
    sinks.log(1, {"eval/score": 0.25})
    sinks.close()
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert list(steps) == [0, 1]
    assert {k: v for k, v in steps[1].items() if k != "time"} == {
        "reward/mean": 0.5,
        "eval/score": 0.25,
    }


def test_an_unknown_logger_lists_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'wanbd'.*tensorboard, wandb"):
        make(tmp_path, "wanbd")


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "swanlab", "trackio", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingDependency, match=rf'pip install "astuner\[{name}\]"'):
            make(tmp_path, name)


def test_the_line_of_a_step_is_readable() -> None:
    text = line(
        12,
        {
            "reward/mean": 0.4312,
            "policy/loss": -0.00213,
            "tokens/trained": 1234.0,
            "episodes/failed": 0.0,
            "seconds/step": 4.32,
        },
    )
    assert text.plain == "step   12  reward 0.431  loss -0.0021  trained 1,234  seconds 4.3"


def test_tensorboard_can_be_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = make(tmp_path, "tensorboard")
    sinks.log(1, {"reward/mean": 0.25})
    sinks.log(2, {"reward/mean": 0.5})
    sinks.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


class Flaky:
    """Logs once, then breaks."""

    logged = 0

    def __init__(self, info: object) -> None: ...

    def log(self, step: int, metrics: object) -> None:
        if Flaky.logged:
            raise ConnectionError("the server went away")
        Flaky.logged += 1

    def close(self) -> None:
        raise AssertionError("a sink that broke is not closed")


class Broken:
    def __init__(self, info: object) -> None:
        raise RuntimeError("not logged in")


def test_a_tracker_that_breaks_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sinks_module.SINKS, "flaky", f"{__name__}:Flaky")
    sinks = make(tmp_path, "flaky")
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            sinks.log(step, {"reward/mean": 0.5})
    sinks.close()
    assert Flaky.logged == 1
    assert len(caplog.records) == 1
    assert "ConnectionError: the server went away" in caplog.records[0].getMessage()
    assert len(lines(tmp_path)) == 3


def test_a_tracker_that_cannot_start_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sinks_module.SINKS, "broken", f"{__name__}:Broken")
    with pytest.raises(ConfigError, match=r"'broken' cannot start.*not logged in"):
        make(tmp_path, "broken")
