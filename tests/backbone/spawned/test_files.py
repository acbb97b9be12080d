"""What crosses between the processes, read by another process than wrote it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from astuner.backbone.spawned import files
from astuner.backbone.spawned.files import (
    GroupRecord,
    JobFile,
    SpoolReader,
    last_sign,
    sign_of_life,
    signs,
    spool_group,
    write_job,
)
from astuner.config.schema import AstunerConfig
from astuner.errors import AstunerError, CheckpointError, ContextLengthError, UserCodeError
from astuner.loading import load_object
from astuner.task_reader import TaskSplits
from astuner.types import Episode, Task, WorkflowOutput

pytest.importorskip("cloudpickle", reason="cloudpickle comes with astuner[verl]")

WORKFLOW = """
from astuner import Workflow, WorkflowOutput
from neighbour import REWARD

SCALE = 3.0

class Agent(Workflow):
    async def execute(self, workflow_task, tuner):
        return WorkflowOutput(reward=REWARD * SCALE)

async def judge(task, output):
    return 1.0
"""
READER = """
import asyncio, sys
from pathlib import Path
from astuner.backbone.spawned.files import read_job
job = read_job(Path(sys.argv[1]))
print(asyncio.run(job.workflow(name="a").execute(None, None)).reward)
print(job.tasks.train[0].main_query, job.config.seed, job.run_dir)
"""


def job(workflow: type, judge: object = None) -> JobFile:
    tasks = TaskSplits([Task(task_id="0", main_query="2+2?")], [])
    return JobFile(AstunerConfig(seed=7), workflow, judge, tasks, Path("/runs/a"))  # type: ignore[arg-type]


def episode(**given: object) -> Episode:
    fields: dict[str, object] = {
        "episode_id": "e0",
        "group_id": "g0",
        "task": Task(task_id="t"),
        "repeat_index": 0,
        "split": "train",
        "calls": (),
        "samples": (),
        "output": None,
        "reward": 1.0,
        "turn_rewards": None,
        "is_success": None,
        "failure": None,
        "started_at": 1.0,
        "ended_at": 2.0,
    }
    return Episode(**(fields | given))  # type: ignore[arg-type]


def test_a_workflow_of_a_file_reaches_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "code"
    source.mkdir()
    (source / "neighbour.py").write_text("REWARD = 0.5\n")
    (source / "agent.py").write_text(WORKFLOW)
    monkeypatch.setattr(sys, "path", list(sys.path))
    workflow = load_object(f"{source / 'agent.py'}->Agent", "workflow")
    write_job(tmp_path, job(workflow))
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert done.stdout.split("\n")[:2] == ["1.5", "2+2? 7 /runs/a"], done.stderr


def test_what_cannot_be_sent_is_said(tmp_path: Path) -> None:
    class WithLock:
        lock = threading.Lock()

    with pytest.raises(UserCodeError, match="cannot pickle"):
        write_job(tmp_path, job(WithLock))
    assert not (tmp_path / "job.pkl").exists()


def test_groups_come_once_in_order_and_whole(tmp_path: Path) -> None:
    reader = SpoolReader(tmp_path)
    assert reader.new() == []
    for name in ("g0", "g1"):
        spool_group(
            tmp_path, GroupRecord(3, "train", name, (episode(group_id=name),), True, {"n": 1.0})
        )
    (tmp_path / "spool" / ".half.group.1.tmp").write_bytes(b"torn")
    read = reader.new()
    assert [(r.group_id, r.step, r.kept, dict(r.counters)) for r in read] == [
        ("g0", 3, True, {"n": 1.0}),
        ("g1", 3, True, {"n": 1.0}),
    ]
    assert read[0].episodes[0].reward == 1.0
    assert reader.new() == [] and list((tmp_path / "spool").glob("*.group")) == []


def test_a_reader_may_keep_the_files(tmp_path: Path) -> None:
    reader = SpoolReader(tmp_path)
    spool_group(tmp_path, GroupRecord(3, "train", "g0", (episode(),), True, name="uid"))
    [(path, record)] = reader.new_files()
    assert path.exists() and (record.group_id, record.name) == ("g0", "uid")
    assert reader.new_files() == []
    (torn := path.with_name(".half.group.1.tmp")).touch()
    files.clear(tmp_path, but_groups=True)
    assert path.exists() and not torn.exists()
    files.clear(tmp_path)
    assert not path.exists()


def test_metadata_that_lives_in_one_process_only_is_no_trouble(tmp_path: Path) -> None:
    loop: dict[str, object] = {}
    loop["itself"] = loop
    outputs = [
        WorkflowOutput(reward=[0.5, 1.0], metadata={"lock": threading.Lock(), "array": np.ones(1)}),
        WorkflowOutput(reward=0.25, metadata={"loop": loop}),
    ]
    record = GroupRecord(1, "train", "g", tuple(episode(output=o) for o in outputs), True)
    spool_group(tmp_path, record)
    first, second = SpoolReader(tmp_path).new()[0].episodes
    assert first.output is not None and second.output is not None
    assert first.output.reward == [0.5, 1.0]
    assert first.output.metadata["array"] == "[1.]"
    assert second.output.reward == 0.25
    assert list(second.output.metadata) == ["shown"]


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert last_sign(tmp_path) == (0.0, "")
    monkeypatch.setattr(files, "_last_sign", -10.0)
    sign_of_life(tmp_path, "rolling out")
    sign_of_life(tmp_path, "too soon")
    at, what = last_sign(tmp_path)
    assert what == "rolling out" and at > 1.7e9


def test_a_sign_counts_whatever_the_clocks_of_the_machines_show(tmp_path: Path) -> None:
    folder = tmp_path / "signs"
    folder.mkdir()
    (folder / "fast-1").write_text('[9e9, "from the future"]')
    (folder / "slow-2").write_text('[5.0, "rolled out"]')
    before = signs(tmp_path)
    assert last_sign(tmp_path) == (9e9, "from the future")
    (folder / "slow-2").write_text('[6.0, "rolled out"]')
    assert signs(tmp_path) != before and signs(tmp_path) == signs(tmp_path)


def test_a_full_disk_is_no_bug(tmp_path: Path) -> None:
    files.give_up(tmp_path, OSError(28, "No space left on device"))
    reason = files.gave_up(tmp_path)
    assert type(reason) is CheckpointError
    assert str(reason).startswith("[Errno 28] No space left on device. What was saved is whole")


def test_the_first_reason_to_give_up_stays_and_keeps_its_type(tmp_path: Path) -> None:
    assert files.gave_up(tmp_path) is None
    files.give_up(tmp_path, ContextLengthError(9, 8))
    files.give_up(tmp_path, UserCodeError("later"))
    reason = files.gave_up(tmp_path)
    assert isinstance(reason, ContextLengthError)
    assert (reason.prompt_tokens, reason.limit) == (9, 8)
    assert str(reason).startswith("The prompt has 9 tokens, but the context limit is 8 tokens.")
    files.clear(tmp_path)
    files.give_up(tmp_path, KeyError("a bug"))
    reason = files.gave_up(tmp_path)
    assert type(reason) is AstunerError and str(reason).endswith("KeyError: 'a bug'")
