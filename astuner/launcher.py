"""From a configuration to a finished run: picks the backbone, makes the run folder, owns signals.

The backbone itself runs in a thread with an event loop of its own, so that a
script, a notebook (which has a running loop) and pytest all work alike; only
`debug` runs in the calling thread where it can, for breakpoints. The first
Ctrl-C asks the run to stop and save, the second ends the process at once.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

from astuner.backbone.context import BACKBONES, RunContext, RunResult
from astuner.config.load import LoadedConfig, check_backbone, check_complete, dump_config
from astuner.env import environment_service
from astuner.errors import CheckpointError, ConfigError
from astuner.task_reader import TaskSplits

CONFIG_FILE = "config.yaml"
TRAINING = ("local", "verl", "trinity", "tinker")
"""Backbones with checkpoints that are not those of another one."""
SAME_SIGNAL_SECONDS = 0.5
"""Wrappers such as `timeout` signal a process and then its group: that is one wish, not two."""
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC))
"""The disk's trouble, and no bug."""


def launch(
    loaded: LoadedConfig,
    *,
    workflow: type | None = None,
    judge: Any = None,
    tasks: TaskSplits | None = None,
    resume: bool = False,
) -> RunResult:
    """Run the configured backbone to its end.

    Raises ConfigError before anything is started when the backbone is unknown or
    would ignore a key that was set.
    """
    name = loaded.config.backbone
    run = backbone_function(name)
    check_complete(
        loaded,
        workflow=workflow is not None,
        tasks=tasks is not None,
        judge=judge is not None,
    )
    for warning in check_backbone(loaded, name):
        print(f"warning: {warning}", file=sys.stderr)
    run_dir = run_folder(loaded, resume=resume)
    stop = threading.Event()
    context = RunContext(loaded, run_dir, workflow, judge, tasks, resume, stop)
    with kept_tidy(run_dir):
        dump_config(loaded.config, run_dir / CONFIG_FILE)
        with environment_service(loaded.config):
            if name == "debug":
                return in_calling_thread(lambda: run(context))
            allow_open_files()
            with stop_on_signals(stop):
                return in_own_thread(lambda: run(context))


def backbone_function(name: str) -> Callable[[RunContext], Any]:
    """The backbone's coroutine function; ConfigError lists the choices."""
    if name not in BACKBONES:
        raise ConfigError(
            f"backbone: unknown value {name!r}. Choose one of: {', '.join(BACKBONES)}"
        )
    module, _, attribute = BACKBONES[name].partition(":")
    return getattr(import_module(module), attribute)


def allow_open_files() -> None:
    """Raise the soft limit of open files to the hard one: each parallel episode needs some,
    and macOS allows 256."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS refuses "infinity"; what is set stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_folder(loaded: LoadedConfig, *, resume: bool) -> Path:
    """`experiment_dir/experiment_name`, numbered if taken; to resume, the newest of them
    with a checkpoint (or of all). Debugging has folders of its own, `NAME-debug`, so that
    nothing is ever resumed there."""
    config = loaded.config
    name = config.experiment_name + ("-debug" if config.backbone == "debug" else "")
    base = free = Path(config.experiment_dir) / name
    taken: list[Path] = []
    for number in count(2):
        if not free.exists():
            break
        taken.append(free)
        free = base.with_name(f"{base.name}-{number}")
    if not resume:
        return free
    if not taken:
        raise ConfigError(
            f"--resume: there is no run folder {base}. Start without --resume, or name the "
            "right experiment with --exp-dir and experiment_name=..."
        )
    return _resumable(taken, config.backbone)


@contextmanager
def kept_tidy(run_dir: Path) -> Generator[None]:
    """A run that fails before it has anything to keep (a misspelt workflow, no model) leaves
    no folder, so that the next attempt is not `NAME-2`. A disk that takes nothing more is
    told as a CheckpointError that names the folder."""
    try:
        yield
    except BaseException as error:
        if all(path.name == CONFIG_FILE for path in run_dir.rglob("*") if path.is_file()):
            shutil.rmtree(run_dir, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            then = "go on with --resume" if run_dir.exists() else "start again"
            raise CheckpointError(
                f"A file of the run in {run_dir} could not be written: {error}. What was "
                f"finished is saved. Make room there, then {then}."
            ) from error
        raise


def _resumable(folders: Sequence[Path], backbone: str) -> Path:
    """The newest folder with a checkpoint of this backbone; a later run that was stopped
    before its first step does not hide it."""
    from astuner.backbone.report import saved_step

    newest = folders[-1]
    saved = (f for f in reversed(folders) if saved_step(f, backbone) is not None)
    chosen = next(saved, newest)
    other = next((name for name in TRAINING if saved_step(chosen, name) is not None), backbone)
    if saved_step(chosen, backbone) is None and other != backbone:
        raise ConfigError(
            f"--resume: {chosen} was trained by the {other} backbone, and {backbone} cannot go "
            f"on from its checkpoints. Use --backbone {other}, or start without --resume."
        )
    if chosen != newest:
        print(f"{newest} has no checkpoint: going on in {chosen}.", file=sys.stderr)
    return chosen


def in_own_thread(make: Callable[[], Any]) -> Any:
    """Run a coroutine to its end in a new thread; waits so that signals still arrive."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(asyncio.run(make()))
        except BaseException as error:  # handed over, re-raised by the waiting thread
            future.set_exception(error)

    threading.Thread(target=work, name="astuner-run", daemon=True).start()
    while not future.done():
        # A wait without a time-out cannot be interrupted by signals on every platform.
        wait([future], timeout=0.5)
    return future.result()


def in_calling_thread(make: Callable[[], Any]) -> Any:
    """Run a coroutine here, unless a loop already runs here (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    return in_own_thread(make)


@contextmanager
def stop_on_signals(stop: threading.Event) -> Generator[None]:
    """First SIGINT or SIGTERM: set `stop`. Second: end the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked_at = 0.0

    def handle(signum: int, _: Any) -> None:
        nonlocal asked_at
        if stop.is_set() and time.monotonic() - asked_at > SAME_SIGNAL_SECONDS:
            os._exit(128 + signum)
        if stop.is_set():
            return
        stop.set()
        asked_at = time.monotonic()
        print("\nstopping: saving what is finished. Once more stops at once.", file=sys.stderr)

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, old in previous.items():
            signal.signal(signum, old)
