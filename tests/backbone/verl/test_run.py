"""The launcher's half of the verl backbone, with a child that writes what verl would."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from astuner import AstunerJob, TunedModel
from astuner.backbone.context import RunContext
from astuner.backbone.spawned import stacks, watching
from astuner.backbone.spawned.files import last_sign
from astuner.backbone.spawned.supervise import Silence
from astuner.backbone.verl import requirements
from astuner.backbone.verl import run as verl_run
from astuner.config.load import from_python
from astuner.config.schema import AstunerConfig
from astuner.errors import (
    AstunerError,
    BackboneError,
    ConfigError,
    DeadlineExceeded,
    MissingDependency,
    UserCodeError,
)
from astuner.tracking import read_episodes, read_metrics
from tests.tiny_run import EarlyLetters, tiny_job

pytest.importorskip("cloudpickle", reason="cloudpickle comes with astuner[verl]")
pytestmark = pytest.mark.timeout(120)

FAKE = (sys.executable, str(Path(__file__).with_name("fake_verl.py")))


@pytest.fixture
def job(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AstunerJob]:
    """A job whose verl is the fake one."""
    monkeypatch.setattr(verl_run, "DRIVER", FAKE)
    monkeypatch.setattr(verl_run, "need_verl", lambda: None)
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))

    def make(how: str = "well", **trainer: Any) -> AstunerJob:
        monkeypatch.setenv("FAKE_VERL", how)
        job = tiny_job(tiny_model_dir, tmp_path, EarlyLetters, **trainer)
        job.config.backbone = "verl"
        job.config.trainer_common.device = "cpu"
        job.config.model.lora.enable = False
        return job

    return make


def first_weight(folder: Path) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.model.norm.weight[0].item()


def test_a_run_reports_like_any_other(job: Callable[..., AstunerJob], tmp_path: Path) -> None:
    tuned = job(total_steps=2).tune()
    run = tmp_path / "tiny"
    assert tuned.path == run / "model"
    summary = json.loads((run / "summary.json").read_text())
    expected = {
        "backbone": "verl",
        "steps": 2,
        "stopped": False,
        "eval_before": 0.0,
        "eval_after": 0.2,
        "tokens_sampled": 16,
        "tokens_trained": 16,
        "tokens_masked_by_reason": {"context": 16},
        "episodes": 8,
        "episodes_failed": 0,
        "steps_skipped": 0,
        "train_seconds": 2.0,
        "checkpoint": str(run / "checkpoints/global_step_2"),
    }
    assert {name: summary[name] for name in expected} == expected
    metrics = read_metrics(run / "metrics.jsonl")
    assert list(metrics) == [0, 1, 2]
    second = {
        "reward/mean": 0.5,
        "policy/loss": 0.5,
        "policy/grad_norm": 2.0,
        "seconds/rollout": 0.5,
        "seconds/train": pytest.approx(0.3),
        "seconds/publish": 0.05,
        "seconds/step": 1.0,
        "staleness/max": 0.0,
        "groups/trained": 2.0,
        "speed/sampled_tokens_per_second": 8.0,
        "total/tokens_trained": 16.0,
        "rollout/calls": 4.0,
        "verl/actor/grad_norm": 2.0,
        "eval/score": 0.2,
        "seconds/eval": 0.25,
    }
    assert {name: metrics[2][name] for name in second} == second
    rows = read_episodes(run).to_pylist()
    assert [(r["step"], r["split"]) for r in rows] == [
        *[(0, "validation")],
        *[(1, "train")] * 4,
        *[(2, "train")] * 4,
        *[(2, "validation")],
    ]
    assert rows[1]["text"]
    assert (run / "learning_curve.png").exists()
    assert not list(tmp_path.glob("astuner-*"))


def test_the_tuned_model_is_used_like_any_other(
    job: Callable[..., AstunerJob], tmp_path: Path, tiny_model_dir: Path
) -> None:
    job(total_steps=1).tune()
    tuned = TunedModel.load(tmp_path / "tiny")
    assert first_weight(tuned.path) == first_weight(tiny_model_dir) + 1
    assert isinstance(tuned.chat("hello", max_tokens=3), str)
    tuned.close()
    assert first_weight(tuned.merge(tmp_path / "merged")) == first_weight(tuned.path)


def test_a_killed_runs_model_is_merged_when_it_is_opened(
    job: Callable[..., AstunerJob], tmp_path: Path, tiny_model_dir: Path
) -> None:
    with pytest.raises(BackboneError):
        job("fails:3", total_steps=5).tune()
    assert not (tmp_path / "tiny" / "model").exists()
    tuned = TunedModel.load(tmp_path / "tiny")
    assert first_weight(tuned.path) == first_weight(tiny_model_dir) + 2


def test_resume_counts_on_and_forgets_what_came_after_the_checkpoint(
    job: Callable[..., AstunerJob], tmp_path: Path
) -> None:
    with pytest.raises(BackboneError):
        job("fails:3", total_steps=4).tune()
    run = tmp_path / "tiny"
    # The checkpoint is older than the metrics: step 2 is done again.
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("1")
    tuned = job(total_steps=4).tune(resume=True)
    assert tuned.metrics["steps"] == 4
    assert tuned.metrics["episodes"] == 16
    assert tuned.metrics["evals"] == {"0": 0.0, "4": 0.4}
    assert list(read_metrics(run / "metrics.jsonl")) == [0, 1, 2, 3, 4]
    steps = [row["step"] for row in read_episodes(run).to_pylist() if row["split"] == "train"]
    assert steps == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    done = job("fails:1", total_steps=4).tune(resume=True)
    assert done.metrics["steps"] == 4, "nothing is left to do, so nothing is started"


def test_a_step_that_was_saved_but_not_reported_is_counted_at_the_resume(
    job: Callable[..., AstunerJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BackboneError):
        job("fails_late:2", total_steps=2).tune()
    run = tmp_path / "tiny"
    assert list(read_metrics(run / "metrics.jsonl")) == [0, 1]
    tuned = job(total_steps=2).tune(resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "Step 2 was saved, but a kill came before its report: verl's metrics of it" in said
    expected = {"steps": 2, "episodes": 8, "tokens_trained": 16, "train_seconds": 1.0}
    assert {name: tuned.metrics[name] for name in expected} == expected
    assert tuned.metrics["evals"] == {"0": 0.0, "2": 0.2}, "the last validation is made up for"
    second = read_metrics(run / "metrics.jsonl")[2]
    assert second["reward/mean"] == 0.5 and "policy/loss" not in second
    rows = [(r["step"], r["split"]) for r in read_episodes(run).to_pylist()]
    assert rows == [
        *[(0, "validation")],
        *[(1, "train")] * 4,
        *[(2, "train")] * 4,
        *[(2, "validation")],
    ]
    assert not list((run / "verl" / "spool").glob("*.group"))


def test_a_checkpoint_of_another_backbone_is_not_resumed(
    job: Callable[..., AstunerJob],
) -> None:
    job(total_steps=1).tune()
    other = job(total_steps=2)
    other.config.backbone = "local"
    other.config.trainer_common.device = "auto"
    with pytest.raises(ConfigError, match="was trained by the verl backbone"):
        other.tune(resume=True)


def test_the_first_wish_to_stop_ends_after_the_step(
    job: Callable[..., AstunerJob], tmp_path: Path
) -> None:
    slow = job("slowly", total_steps=200)
    config = cast(AstunerConfig, OmegaConf.to_object(cast(Any, slow.config)))
    run, stop = tmp_path / "tiny", threading.Event()
    context = RunContext(from_python(config), run, EarlyLetters, None, slow._tasks, stop=stop)
    run.mkdir()

    def stop_when_training() -> None:
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or '"step": 1' not in metrics.read_text():
            time.sleep(0.02)
        stop.set()

    threading.Thread(target=stop_when_training, daemon=True).start()
    result = asyncio.run(verl_run.run(context))
    assert result.stopped
    assert 1 <= result.summary["steps"] < 200
    assert result.model_dir == run / "model"


def test_silence_ends_the_run_and_says_where_it_hung(
    job: Callable[..., AstunerJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()

    def clock() -> float:
        """Runs from the moment that the child hangs: its last sign is there."""
        return float(next(ticks)) if last_sign(tmp_path / "tiny" / "verl")[1] else 0.0

    monkeypatch.setattr(watching, "Silence", partial(Silence, clock=clock))
    monkeypatch.setattr(verl_run, "VERL", replace(verl_run.VERL, trainer="fake_verl.py"))
    monkeypatch.setattr(stacks, "_INTERESTING", re.compile("fake_verl"))
    hanging = job("hangs:2", total_steps=4)
    hanging.config.trainer_common.stall_timeout = 20.0
    with pytest.raises(DeadlineExceeded) as caught:
        hanging.tune()
    message = str(caught.value)
    assert re.search(r"no sign of life for 2\d s while publishing in step 2 of 9", message)
    assert "sending weights" in message
    assert "  misbehave (" in message
    assert "Step 1 is saved: go on with --resume." in message
    assert str(tmp_path / "tiny" / "verl" / "verl.log") in message


def test_a_failure_shows_the_exception_and_the_log(
    job: Callable[..., AstunerJob], tmp_path: Path
) -> None:
    with pytest.raises(BackboneError) as caught:
        job("fails:2", total_steps=4).tune()
    lines = str(caught.value).splitlines()
    assert lines[0] == "verl failed while rolling out in step 2 of 4, exit code 1:"
    assert "RuntimeError: the trainer has no more cheese" in lines
    assert len(lines) < 12
    assert lines[-1] == (
        f"Everything it printed: {tmp_path / 'tiny' / 'verl' / 'verl.log'}. "
        "Step 1 is saved: go on with --resume."
    )


def test_what_a_worker_gives_up_for_is_the_runs_error(
    job: Callable[..., AstunerJob], tmp_path: Path
) -> None:
    with pytest.raises(UserCodeError, match="every episode failed"):
        job("gives_up:1", total_steps=4, val_before_train=False).tune()
    assert not (tmp_path / "tiny").exists(), "nothing to keep: the next attempt has the name"


def test_the_log_of_a_bug_stays(job: Callable[..., AstunerJob], tmp_path: Path) -> None:
    with pytest.raises(AstunerError, match='KeyError: "a bug of astuner\'s"'):
        job("has_a_bug:1", total_steps=4, val_before_train=False).tune()
    assert (tmp_path / "tiny" / "verl" / "verl.log").exists()


def test_without_verl_the_install_line_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "PACKAGES", ("no_such_verl",))
    with pytest.raises(MissingDependency, match=r'pip install "astuner\[verl\]"'):
        requirements.need_verl()


def config_with(**trainer: Any) -> AstunerConfig:
    config = AstunerConfig(backbone="verl")
    for name, value in trainer.items():
        setattr(config.trainer_common, name, value)
    return config


def test_no_gpu_means_the_cpu_with_a_warning_unless_gpus_were_asked_for() -> None:
    warnings: list[str] = []
    assert requirements.choose_device(config_with(), warnings.append, visible=0) == "cpu"
    assert len(warnings) == 1 and "No GPU is visible" in warnings[0]
    with pytest.raises(ConfigError, match="no GPU is visible"):
        requirements.choose_device(config_with(device="cuda"), warnings.append, visible=0)
    wanted = config_with(device="cpu")
    assert requirements.choose_device(wanted, warnings.append, visible=8) == "cpu"
    assert len(warnings) == 1


def test_more_gpus_than_there_are_is_an_error_before_anything_starts() -> None:
    enough = config_with(n_gpus_per_node=4)
    assert requirements.choose_device(enough, print, visible=4) == "cuda"
    enough.rollout.mode = "async"
    with pytest.raises(ConfigError, match="asks for 5 GPUs, but 4 are visible"):
        requirements.choose_device(enough, print, visible=4)
    with pytest.raises(ConfigError, match="--ray-address auto"):
        requirements.choose_device(config_with(nnodes=2), print, visible=8)
    joins = config_with(nnodes=2, ray_address="auto")
    assert requirements.choose_device(joins, print, visible=0) == "cuda"
