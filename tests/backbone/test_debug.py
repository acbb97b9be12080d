"""The debug backbone: in order, in the calling thread, with three kinds of model."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from astuner import AstunerJob, ModelTuner, WorkflowOutput, WorkflowTask
from astuner.backbone.context import RunResult
from astuner.chat.byte_codec import ByteCodec
from astuner.config.load import from_python
from astuner.engine.fake import FakeEngine
from astuner.errors import ConfigError
from astuner.job.job import _plain
from astuner.launcher import launch
from astuner.model_tuner import SessionSpec, TunerServer
from tests.tiny_run import EarlyLetters, tiny_job

SEEN: list[tuple[str, str]] = []


class Noting(EarlyLetters):
    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        SEEN.append((threading.current_thread().name, workflow_task.episode_id))
        return await super().execute(workflow_task, tuner)


def debug(job: AstunerJob) -> RunResult:
    job.config.backbone = "debug"
    loaded = from_python(_plain(job.config))
    return launch(loaded, workflow=job._workflow, tasks=job._tasks)


def test_runs_in_order_in_the_main_thread(tmp_path: Path) -> None:
    SEEN.clear()
    job = tiny_job(Path("unused"), tmp_path, Noting)
    job.config.debug.model = "fake"
    job.config.debug.fake_replies = ["abcz"]
    job.config.debug.num_repeat = 2
    result = debug(job)
    here = threading.current_thread().name
    assert [(here, f"s00000-t00{t}-e0{e}") for t in (0, 1) for e in (0, 1)] == SEEN
    assert result.summary["mean_reward"] == 0.75
    assert result.summary["episodes"] == 4


def test_the_collector_passes_over_what_was_loaded_before(tmp_path: Path) -> None:
    kept: list[int] = []

    class Counting(EarlyLetters):
        async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
            kept.append(gc.get_freeze_count())
            return await super().execute(workflow_task, tuner)

    job = tiny_job(Path("unused"), tmp_path, Counting)
    job.config.debug.model = "fake"
    debug(job)
    assert min(kept) > 10_000
    assert gc.get_freeze_count() == 0


def test_the_first_line_of_ones_own_waits_for_nothing_heavy(tmp_path: Path) -> None:
    """A run with the fake model needs no model, so none of what loads, trains or reads one;
    an SDK is imported when a client of it is asked for."""
    heavy = {
        *("torch", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "renderers"),
        *("huggingface_hub", "datasets", "pandas", "pyarrow", "scipy", "sympy", "matplotlib"),
        *("openai", "anthropic", "litellm", "fastapi", "agentscope", "ray", "vllm", "tinker"),
    }
    (tmp_path / "tasks.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        "from astuner import Workflow, WorkflowOutput\n"
        "class Mine(Workflow):\n"
        "    async def execute(self, workflow_task, tuner):\n"
        f"        print('loaded', sorted({heavy!r} & set(sys.modules)))\n"
        "        return WorkflowOutput(reward=1.0)\n"
    )
    (tmp_path / "run.yaml").write_text(
        "astuner:\n"
        "  debug: {model: fake}\n"
        f"  rollout: {{user_workflow: '{tmp_path}/mine.py->Mine'}}\n"
    )
    command = [sys.executable, "-m", "astuner.cli", "--conf", str(tmp_path / "run.yaml")]
    command += ["--backbone", "debug", "--exp-dir", str(tmp_path / "runs")]
    command += [f"task_reader.jsonl_dataset_file.training.file_path={tmp_path}/tasks.jsonl"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "loaded []" in ended.stdout


def test_shows_tokens_and_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tiny_job(Path("unused"), tmp_path)
    job.config.debug.model = "fake"
    job.config.debug.fake_replies = ["abcz"]
    debug(job)
    out = capsys.readouterr().out
    assert "reward 0.75" in out
    assert "a-0.50" in out  # the token and its logprob
    assert "5 trained" in out  # four letters and the end of the turn


def test_a_train_step_is_computed_and_thrown_away(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job(tiny_model_dir, tmp_path)
    job.config.debug.num_repeat = 4
    job.config.debug.train_step = True
    step = debug(job).summary["train_step"]
    assert step["grad_norm"] > 0
    assert "thrown away" in capsys.readouterr().out
    assert not list((tmp_path / "tiny").glob("checkpoints"))


def test_a_train_step_needs_the_embedded_model(tmp_path: Path) -> None:
    job = tiny_job(Path("unused"), tmp_path)
    job.config.debug.model = "fake"
    job.config.debug.train_step = True
    with pytest.raises(ConfigError, match="embedded"):
        debug(job)


def test_an_endpoint_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = ByteCodec()
    engine = FakeEngine([[*codec.encode("mmmz").tolist(), 257]])
    with TunerServer(engine, codec, model_name="theirs") as theirs:
        endpoint = theirs.open_session(SessionSpec("outside")).tuner.as_oai_baseurl_apikey()
        monkeypatch.setenv("THEIR_KEY", endpoint.api_key)
        job = tiny_job(Path("unused"), tmp_path)
        job.config.debug.model = "endpoint"
        job.config.debug.endpoint.base_url = endpoint.base_url
        job.config.debug.endpoint.model = "theirs"
        job.config.debug.endpoint.api_key_env = "THEIR_KEY"
        assert debug(job).summary["mean_reward"] == 0.75
