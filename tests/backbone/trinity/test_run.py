"""The launcher's half of the trinity backbone, with children that write what Trinity would."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from astuner import AstunerJob
from astuner.backbone.context import RunContext
from astuner.backbone.spawned import watching
from astuner.backbone.trinity import run as trinity_run
from astuner.backbone.trinity import service_child
from astuner.backbone.trinity.planning import SPARE_STEPS
from astuner.config.load import from_python
from astuner.errors import BackboneError, ConfigError, MissingDependency, UserCodeError
from astuner.tracking import read_episodes, read_metrics
from astuner.types import Episode
from tests.backbone.trinity.made_up import group
from tests.backbone.trinity.test_service_child import LISTENS
from tests.tiny_run import EarlyLetters, tiny_job

pytest.importorskip("cloudpickle", reason="cloudpickle comes with astuner[trinity]")
pytestmark = pytest.mark.timeout(120)

FAKE = (sys.executable, str(Path(__file__).with_name("fake_trinity.py")))
Make = Callable[..., AstunerJob]


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A job whose Trinity and service are fake ones."""

    async def validated(*given: Any) -> list[Episode]:
        return list(group().episodes)

    monkeypatch.setattr(trinity_run, "DRIVER", FAKE)
    monkeypatch.setattr(trinity_run, "need_trinity", lambda way: None)
    monkeypatch.setattr(trinity_run.final, "validate", validated)
    monkeypatch.setattr(service_child, "COMMAND", (sys.executable, "-c", LISTENS))
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))

    def make(how: str = "well", **trainer: Any) -> AstunerJob:
        monkeypatch.setenv("FAKE_TRINITY", how)
        job = tiny_job(tiny_model_dir, tmp_path, EarlyLetters, **trainer)
        job.config.backbone = "trinity"
        job.config.trainer_common.device = "cpu"
        job.config.rollout.val_kwargs.num_repeat = 2  # of two tasks: as many as in a made-up group
        return job

    return make


def test_a_run_reports_like_any_other(job: Make, tmp_path: Path) -> None:
    tuned = job(total_steps=2).tune()
    run = tmp_path / "tiny"
    assert tuned.path == run / "model"
    assert (run / "model" / "adapter_model.safetensors").read_text() == "2"
    summary = json.loads((run / "summary.json").read_text())
    expected = {
        "backbone": "trinity",
        "steps": 2,
        "stopped": False,
        "eval_before": 0.375,
        "eval_after": 0.375,
        "tokens_trained": 24,
        "episodes": 16,
        "episodes_failed": 4,
        "train_seconds": 2.0,
        "checkpoint": str(run / "checkpoints/trinity/global_step_2"),
    }
    assert {name: summary[name] for name in expected} == expected
    metrics = read_metrics(run / "metrics.jsonl")
    assert list(metrics) == [0, 1, 2]
    assert metrics[2]["policy/ppo_kl"] == 0.0 and metrics[2]["groups/trained"] == 2.0
    rows = read_episodes(run).to_pylist()
    rewarded = sorted(row["step"] for row in rows)
    assert set(rewarded) == {0, 1, 2} and rewarded.count(1) == 2 * rewarded.count(0)


def test_what_trinity_is_told_and_what_it_plays(job: Make, tmp_path: Path) -> None:
    job(total_steps=2).tune()
    folder = tmp_path / "tiny" / "trinity"
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["model.tinker.base_url"] == "http://127.0.0.1:4321"
    assert settings["synchronizer.sync_method"] == "memory"
    assert settings["trainer.total_steps"] == 2
    assert "tml-" not in json.dumps(settings)
    rows = (folder / "tasks" / "train" / "tasks.jsonl").read_text().splitlines()
    played = [json.loads(row)["index"] for row in rows]
    assert len(played) == 2 * (2 + SPARE_STEPS)
    assert sorted(played[:4]) == [0, 1, 2, 3]  # an epoch of four tasks is two steps
    validation = (folder / "tasks" / "validation" / "tasks.jsonl").read_text()
    assert [json.loads(row)["index"] for row in validation.splitlines()] == [0, 1]


def test_fewer_steps_than_asked_are_an_error_whatever_trinity_reports(job: Make) -> None:
    with pytest.raises(BackboneError, match="ended after 1 of 3 steps and reported success"):
        job("short:1", total_steps=3).tune()


def test_a_half_that_breaks_off_ends_the_run(job: Make, tmp_path: Path) -> None:
    with pytest.raises(BackboneError) as caught:
        job("breaks:2", total_steps=3).tune()
    message = str(caught.value)
    assert "ValueError: the explorer has no more cheese" in message
    assert str(tmp_path / "tiny" / "trinity" / "trinity.log") in message
    assert "Step 1 is saved: go on with --resume." in message


def test_what_a_runner_gives_up_for_is_the_runs_error(job: Make, tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="every episode failed"):
        job("gives_up:1", total_steps=3, val_before_train=False).tune()
    assert not (tmp_path / "tiny").exists()  # nothing to keep


def test_a_resume_goes_on_where_it_was(job: Make, tmp_path: Path) -> None:
    with pytest.raises(BackboneError):
        job("short:2", total_steps=4).tune()
    tuned = job(total_steps=4).tune(resume=True)
    assert (tuned.path / "adapter_model.safetensors").read_text() == "4"
    metrics = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert list(metrics) == [0, 1, 2, 3, 4]
    assert metrics[4]["total/tokens_trained"] == 48.0
    state = tmp_path / "tiny" / "checkpoints" / "trinity" / "explorer_meta.json"
    assert json.loads(state.read_text())["latest_iteration"] == 2


def test_a_finished_run_resumed_only_reports(job: Make, tmp_path: Path) -> None:
    job(total_steps=2).tune()
    job("breaks:1", total_steps=2).tune(resume=True)
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert (summary["steps"], summary["eval_after"]) == (2, 0.375)


def test_the_first_ctrl_c_saves_the_step(job: Make, tmp_path: Path) -> None:
    made, run, stop = job("slowly", total_steps=200), tmp_path / "tiny", threading.Event()
    context = RunContext(from_python(made.config), run, EarlyLetters, tasks=made._tasks, stop=stop)  # type: ignore[attr-defined]

    async def both() -> Any:
        running = asyncio.create_task(trinity_run.run(context))
        while not (run / "metrics.jsonl").exists():
            await asyncio.sleep(0.05)
        stop.set()
        return await running

    result = asyncio.run(asyncio.wait_for(both(), 100))
    assert result.stopped and 1 <= result.summary["steps"] < 200
    assert result.model_dir == run / "model"


def test_without_the_package_the_line_that_installs_it(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    made = tiny_job(tmp_path, tmp_path, EarlyLetters)
    made.config.backbone = "trinity"
    made.config.trainer_common.device = "cpu"
    monkeypatch.setattr("astuner.backbone.spawned.devices.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"astuner\[trinity\]"):
        made.tune()


def test_what_cannot_be_honoured_is_refused_first(job: Make, tmp_path: Path) -> None:
    made = job()
    made.config.model.lora.enable = False
    with pytest.raises(ConfigError, match="a service trains adapters"):
        made.tune()
    assert not (tmp_path / "tiny").exists()
