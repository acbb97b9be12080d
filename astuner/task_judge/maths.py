"""Mathematical equality by the math-verify package: "\\frac{1}{2}" equals "0.5".

Comparing can take for ever (9^9^9^9), and the package's own time limits need a
main thread, so one child process of this judge does the work; it is ended and
started anew when it does not answer in time. An answer with some other formula
gets `wrong_reward`, one without any gets 0.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from astuner.config.schema import TaskJudgeConfig
from astuner.errors import EngineError, MissingDependency
from astuner.task_judge.answers import answer_text, lone_number, reference_text
from astuner.types import WorkflowOutput, WorkflowTask

logger = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("maths_worker.py")
_START_SECONDS = 60.0


class MathVerify:
    """1 if math-verify finds answer and reference equal."""

    def __init__(self, config: TaskJudgeConfig, *, seconds: float = 20.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise MissingDependency("math-verify", "math", "task_judge.judge_type: math_verify")
        self._config = config
        self._worker = Comparer(seconds)

    def compute_reward(self, task: WorkflowTask, output: WorkflowOutput) -> tuple[float, bool]:
        wanted = reference_text(task, self._config)
        answer = answer_text(output, self._config)
        a, b = lone_number(answer), lone_number(wanted)
        if answer and (answer == wanted or (a is not None and a == b)):
            return 1.0, True
        compared = self._worker.compare(wanted, answer)
        if compared["same"]:
            return 1.0, True
        return (self._config.wrong_reward if compared["parsed"] else 0.0), False


class Comparer:
    """The child process; one comparison at a time, from any thread. If we are killed, its
    stdin ends, and so does it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def compare(self, reference: str, answer: str) -> dict[str, bool]:
        """`{"parsed", "same"}` of the answer; both False when it takes too long.

        Raises EngineError if the child cannot be started, or ends without being asked to.
        """
        started = time.monotonic()
        request = json.dumps({"reference": reference, "answer": answer})
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._child = _start()
                weakref.finalize(self, self._child.kill)  # also at exit
            line = _ask(self._child, request, self._seconds)
            died = not line and time.monotonic() - started < self._seconds
        if line:
            return json.loads(line)
        if died:
            raise EngineError(
                "The process that compares mathematical answers ended on its own (out of "
                f"memory?) at the answer {answer[:80]!r}. It is started again for the next one."
            )
        logger.warning("No verdict within %g s on the answer %.80r", self._seconds, answer)
        return {"parsed": False, "same": False}


def _start() -> subprocess.Popen[str]:
    command = [sys.executable, "-P", str(_WORKER)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C in the terminal is the run's to handle
    )
    if _ask(child, None, _START_SECONDS).strip() != "ready":
        raise EngineError(
            "The process that compares mathematical answers did not start. "
            f"To see why, run: {' '.join(command)}"
        )
    return child


def _ask(child: subprocess.Popen[str], request: str | None, seconds: float) -> str:
    """The child's next line; "" if it has ended, or had to be ended after `seconds`."""
    pipes: Any = child
    alarm = threading.Timer(seconds, child.kill)
    alarm.daemon = True
    alarm.start()
    try:
        if request is not None:
            pipes.stdin.write(request + "\n")
            pipes.stdin.flush()
        return pipes.stdout.readline()
    except BrokenPipeError:
        return ""
    finally:
        alarm.cancel()
