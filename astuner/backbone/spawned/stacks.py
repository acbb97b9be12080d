"""Where each of the processes below the launcher is stuck, asked from outside.

Loaded into every one of them: on SIGUSR2 a process writes the stacks of its threads into a
file of its own, also where it hangs in native code. The launcher asks those of its own
machine before it ends a run that has fallen silent.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from itertools import islice
from pathlib import Path

import psutil

from astuner.backbone.spawned.files import FOLDER_VARIABLE, STACKS, this_host, this_process

SIGNAL = signal.SIGUSR2
SECONDS_TO_WRITE = 2.0
_FRAME = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+) in (?P<name>.+)')
_INSTALLED = re.compile(r".*/(?:site|dist)-packages/")
_INTERESTING = re.compile(r"(^|/)(verl|trinity|astuner|vllm|transfer_queue|tinker)/")


def answer_for_stacks(folder: Path) -> None:
    """From now on this process answers. Its file stays empty until it is asked."""
    path = folder / STACKS / this_process()
    path.parent.mkdir(parents=True, exist_ok=True)
    faulthandler.register(SIGNAL, path.open("w"), all_threads=True)


def ask_for_stacks(folder: Path, seconds: float = SECONDS_TO_WRITE) -> dict[Path, str]:
    """Have all processes of this machine write; the files that are not empty, and whose
    (the process's title)."""
    files = sorted((folder / STACKS).glob(f"{this_host()}-*"))
    asked = {path: title for path in files if (title := _ask(path)) is not None}
    time.sleep(seconds if asked else 0.0)
    return {path: title for path, title in asked.items() if path.stat().st_size}


def _ask(path: Path) -> str | None:
    """The title of the process that was asked. Only one that is older than the file is the one
    that opened it: an unrelated one, with its number used again, would die of the signal."""
    try:
        process = psutil.Process(int(path.name.rpartition("-")[2]))
        if process.create_time() > path.stat().st_mtime:
            return None
        title = " ".join(process.cmdline())
        process.send_signal(SIGNAL)
    except psutil.Error:
        return None
    return title


def where_stuck(stacks: dict[Path, str], title: str, frames: int = 4) -> str:
    """The innermost frames of interest of the process whose title has `title` in it."""
    found = (path for path, seen in stacks.items() if title in seen)
    return "".join(innermost(path.read_text(), frames) for path in islice(found, 1))


def innermost(dump: str, frames: int) -> str:
    """Of the thread with most frames of the trainer's or ours, the last that were called first."""
    threads = dump.split("\n\n")
    seen = [[m for m in _FRAME.finditer(t) if _is_interesting(m["file"])] for t in threads]
    deepest = max(seen, key=len, default=[])
    return "\n".join(f"  {m['name']} ({m['file']}:{m['line']})" for m in deepest[:frames])


def _is_interesting(file: str) -> bool:
    """By the package's name: the environment may itself lie in a folder of such a name."""
    package, installed = _INSTALLED.subn("", file)
    return bool((_INTERESTING.match if installed else _INTERESTING.search)(package))


if FOLDER_VARIABLE in os.environ:
    answer_for_stacks(Path(os.environ[FOLDER_VARIABLE]))
