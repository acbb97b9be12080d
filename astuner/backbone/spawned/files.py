"""What the launcher and the processes below it tell each other: files in one folder of the run.

    job.pkl            in:  configuration, workflow, judge and tasks, for every worker
    settings.json      in:  the trainer's own configuration
    spool/*.group      out: groups that have ended
    signs/HOST-PID     out: what a process did last; a hang is their silence
    stage.json         out: where the trainer is
    metrics.jsonl      out: the trainer's own metrics
    gave_up.pkl        out: why nothing more can come of the run
    stop               in:  exists once the user wants the run to end after its step
    NAME.log           all that the processes print (`program`)

Everything is written under a temporary name and renamed, so that a reader sees whole
files only, on a file system that several machines share too. Nothing here knows Ray or
a trainer. The folder's name is in the environment variable `ASTUNER_RUN_FOLDER`.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from astuner.config.schema import AstunerConfig
from astuner.errors import AstunerError, CheckpointError, MissingDependency, UserCodeError
from astuner.loading import FILE_MODULE
from astuner.task_judge import Judge
from astuner.task_reader import TaskSplits
from astuner.types import Episode, Task, WorkflowOutput

FOLDER_VARIABLE = "ASTUNER_RUN_FOLDER"
JOB, SPOOL, SIGNS, GAVE_UP = "job.pkl", "spool", "signs", "gave_up.pkl"
SETTINGS, STAGE, METRICS, STOP = "settings.json", "stage.json", "metrics.jsonl", "stop"
STACKS = "stacks"
SECONDS_BETWEEN_SIGNS = 1.0


@dataclass(frozen=True)
class JobFile:
    """All that a worker needs to run episodes."""

    config: AstunerConfig
    workflow: type
    judge: Judge | None
    tasks: TaskSplits
    run_dir: Path


@dataclass(frozen=True)
class GroupRecord:
    """A group of episodes that has ended, or one episode of a validation."""

    step: int
    """The step it was rolled out for; finished steps at a validation."""
    split: Literal["train", "validation"]
    group_id: str
    episodes: tuple[Episode, ...]
    kept: bool
    """False when the trainer got nothing of it (and refills it)."""
    counters: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of the rollout since the process's previous record, to be summed."""
    name: str = ""
    """The trainer's own of this attempt at the group, where it has one."""


def folder_of_process() -> Path:
    """The folder that this process was started with. Raises KeyError outside one."""
    return Path(os.environ[FOLDER_VARIABLE])


# ---------------------------------------------------------------- the job


def write_job(folder: Path, job: JobFile) -> Path:
    """Write the job; what no worker could import (a script's or notebook's own classes, a
    file's) goes in whole. Raises UserCodeError for what cannot be sent."""
    cloudpickle = _cloudpickle(job.config.backbone)
    with _by_value(cloudpickle):
        try:
            content = cloudpickle.dumps(job)
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
            raise UserCodeError(
                f"Workflow, judge and tasks have to be sent to other processes, but: {error}. "
                "Make what cannot be sent (locks, open files, clients, loaded models) inside "
                "`execute` or the judge's first call instead of at import or in __init__."
            ) from error
    path = folder / JOB
    _write(path, pickle.dumps({"sys_path": [str(Path.cwd()), *sys.path], "job": content}))
    return path


def read_job(folder: Path) -> JobFile:
    """The job, with the import path of the process that wrote it added to ours."""
    outer = pickle.loads((folder / JOB).read_bytes())
    # In front, as there: the environment may have another package of the same name.
    sys.path[:0] = [p for p in dict.fromkeys(outer["sys_path"]) if p and p not in sys.path]
    return pickle.loads(outer["job"])


@contextmanager
def _by_value(pickler: Any) -> Generator[None]:
    """Modules loaded from a file's path exist under their name in this process only."""
    modules = [m for name, m in sys.modules.items() if name.startswith(FILE_MODULE)]
    for module in modules:
        pickler.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            pickler.unregister_pickle_by_value(module)


# ---------------------------------------------------------------- groups that have ended


_number = count()


def spool_group(folder: Path, record: GroupRecord) -> None:
    """Hand a group to the launcher. Raises OSError when the disk is full."""
    import cloudpickle

    plain = replace(record, episodes=tuple(_plain(e) for e in record.episodes))
    name = f"{time.time_ns():020d}-{this_process()}-{next(_number)}.group"
    _write(folder / SPOOL / name, cloudpickle.dumps(plain))


class SpoolReader:
    """Reads each spooled group once, in the order of their ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / SPOOL
        self._read: set[Path] = set()

    def new(self) -> list[GroupRecord]:
        """What has come since the last call; its files are deleted."""
        records: list[GroupRecord] = []
        for path, record in self.new_files():
            path.unlink()
            records.append(record)
        return records

    def new_files(self) -> list[tuple[Path, GroupRecord]]:
        """The same with the files, which the caller deletes."""
        if not self._folder.is_dir():
            return []
        there = sorted(self._folder.glob("*.group"))
        new = [path for path in there if path not in self._read]
        self._read = set(there)
        return [(path, pickle.loads(path.read_bytes())) for path in new]


def _plain(episode: Episode) -> Episode:
    """What users put into metadata may exist in their process only: it goes as JSON."""
    output = episode.output and WorkflowOutput.model_validate(_as_json(episode.output))
    return replace(episode, output=output, task=Task.model_validate(_as_json(episode.task)))


def _as_json(model: BaseModel) -> dict[str, Any]:
    """The fields as JSON holds them; other objects by what `str` shows of them."""
    fields = model.model_dump()
    try:
        return json.loads(json.dumps(fields, default=str))
    except (TypeError, ValueError, RecursionError):  # keys that are tuples, loops
        return {**fields, "metadata": {"shown": repr(fields["metadata"])}}


# ---------------------------------------------------------------- signs of life


_last_sign = 0.0


def sign_of_life(folder: Path, what: str) -> None:
    """Say what this process does or awaits. Cheap; at most one a second is written. Call it
    when something happens, never on a timer: a hang must fall silent."""
    global _last_sign
    now = time.monotonic()
    if now - _last_sign < SECONDS_BETWEEN_SIGNS:
        return
    _last_sign = now
    _write(folder / SIGNS / this_process(), json.dumps([time.time(), what]).encode())


def signs(folder: Path) -> object:
    """Differs from the last time if any process has given one, whatever the clocks of several
    machines show."""
    return {path.name: _read_sign(path) for path in (folder / SIGNS).glob("[!.]*")}


def last_sign(folder: Path) -> tuple[float, str]:
    """Unix time and text of the newest sign of any process; (0, "") if there is none."""
    signs = [_read_sign(path) for path in (folder / SIGNS).glob("[!.]*")]
    return max(signs, default=(0.0, ""))


def _read_sign(path: Path) -> tuple[float, str]:
    at, what = json.loads(path.read_text())
    return float(at), str(what)


@dataclass(frozen=True)
class Stage:
    """Where the trainer is: a stage of `tracking.display`, or words for the start."""

    name: str
    step: int = 0
    total: int = 0


def write_stage(folder: Path, stage: Stage) -> None:
    _write(folder / STAGE, json.dumps([stage.name, stage.step, stage.total]).encode())


def read_stage(folder: Path) -> Stage | None:
    """None before the trainer's process runs."""
    try:
        return Stage(*json.loads((folder / STAGE).read_text()))
    except FileNotFoundError:
        return None


# ---------------------------------------------------------------- giving up


def give_up(folder: Path, error: BaseException) -> None:
    """Say that nothing more can come of the run; the launcher ends it. The first reason stays."""
    if not (folder / GAVE_UP).exists():
        reason = error if isinstance(error, AstunerError) else _told(error)
        _write(folder / GAVE_UP, pickle.dumps((type(reason), reason.args, vars(reason))))


def gave_up(folder: Path) -> AstunerError | None:
    """Why, if so."""
    try:
        kind, arguments, fields = pickle.loads((folder / GAVE_UP).read_bytes())
    except FileNotFoundError:
        return None
    reason: AstunerError = kind.__new__(kind, *arguments)  # __init__ may want other arguments
    reason.args = arguments
    vars(reason).update(fields)
    return reason


def _told(error: BaseException) -> AstunerError:
    """Something that is no AstunerError: a full disk, or a bug, with its traceback."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"{error}. What was saved is whole: make room, and --resume.")
    return AstunerError("".join(traceback.format_exception(error)).rstrip())


# ---------------------------------------------------------------- small things


def clear(folder: Path, *, but_groups: bool = False) -> None:
    """Forget what an earlier attempt left in the folder, or all but its groups."""
    for name in (SIGNS, STACKS) if but_groups else (SPOOL, SIGNS, STACKS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for torn in (folder / SPOOL).glob(".*.tmp"):
        torn.unlink(missing_ok=True)
    for name in (GAVE_UP, STAGE, METRICS, STOP):
        (folder / name).unlink(missing_ok=True)


def this_host() -> str:
    return socket.gethostname()


def this_process() -> str:
    return f"{this_host()}-{os.getpid()}"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{this_process()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _cloudpickle(backbone: str) -> Any:
    try:
        import cloudpickle
    except ModuleNotFoundError as error:
        raise MissingDependency("cloudpickle", backbone, f"The backbone {backbone}") from error
    return cloudpickle
