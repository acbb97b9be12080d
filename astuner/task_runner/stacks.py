"""Tracebacks and stacks with the user's lines only.

A frame is the user's when its file belongs neither to astuner, nor to the
standard library, nor to an installed package. Nothing here raises for odd input;
where no frame is the user's, the innermost ones are shown rather than nothing.
"""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path
from traceback import FrameSummary, StackSummary, TracebackException
from types import FrameType
from typing import Any

_PACKAGE = str(Path(__file__).resolve().parent.parent) + "/"
_LIBRARY = tuple(
    str(Path(sysconfig.get_path(name)).resolve()) + "/"
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
SHOWN = 3
"""Frames that are shown where none is the user's."""


def _is_ours(filename: str) -> bool:
    return str(Path(filename).resolve()).startswith(_PACKAGE)


def is_users(filename: str) -> bool:
    """Whether a file is the user's own."""
    if filename.startswith("<"):
        return filename.startswith("<ipython")  # a notebook's cell
    path = str(Path(filename).resolve())
    if _is_ours(filename) or "/site-packages/" in path or "/dist-packages/" in path:
        return False
    return not path.startswith(_LIBRARY)


def user_traceback(error: BaseException) -> str:
    """The formatted traceback of an exception and its causes, the user's frames only; where
    there are none (an agent that is an installed package), the innermost that are not ours."""
    summary = TracebackException.from_exception(error)
    foreign = [f for f in summary.stack if not _is_ours(f.filename)]
    if not _keep_users(summary):
        summary.stack = StackSummary.from_list(foreign[-SHOWN:])
    return "".join(summary.format()).rstrip()


def _keep_users(summary: TracebackException) -> bool:
    """Drop foreign frames, and causes that have no frame of the user's. True if any is left."""
    summary.stack = StackSummary.from_list([f for f in summary.stack if is_users(f.filename)])
    if summary.__cause__ is not None and not _keep_users(summary.__cause__):
        summary.__cause__ = None
        summary.__suppress_context__ = True
    if summary.__context__ is not None and not _keep_users(summary.__context__):
        summary.__context__ = None
    inner = [_keep_users(e) for e in summary.exceptions or ()]
    return bool(summary.stack) or any(inner)


def raised_at(error: BaseException) -> str:
    """ "file.py:12" of the innermost frame of the user's, or ""."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def waiting_at(thread_id: int, coroutine: Any = None) -> str:
    """Where a thread stands: the user's frames if it runs or blocks in them, else those of
    the coroutine it is waiting for. Formatted as in a traceback; "" if nothing is known."""
    blocked = _extract(_stack(sys._current_frames().get(thread_id)))  # pyright: ignore[reportPrivateUsage]
    if any(is_users(frame.filename) for frame in blocked):
        return _format(blocked)
    return _format(_extract(_await_chain(coroutine)) or blocked)


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Outermost first."""
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def _await_chain(awaitable: Any) -> list[FrameType]:
    """The suspended frames from a coroutine down to what it awaits."""
    frames: list[FrameType] = []
    while awaitable is not None:
        frame = getattr(awaitable, "cr_frame", None) or getattr(awaitable, "ag_frame", None)
        if frame is not None:
            frames.append(frame)
        awaitable = getattr(awaitable, "cr_await", None) or getattr(awaitable, "ag_await", None)
    return frames


def _extract(frames: list[FrameType]) -> list[FrameSummary]:
    return list(StackSummary.extract((frame, frame.f_lineno) for frame in frames))


def _format(frames: list[FrameSummary]) -> str:
    """The user's frames, or the last few if none is; plus the innermost as a hint."""
    shown = [f for f in frames if is_users(f.filename)] or frames[-SHOWN:]
    if frames and frames[-1] not in shown:
        shown.append(frames[-1])
    return "".join(StackSummary.from_list(shown).format()).rstrip()
