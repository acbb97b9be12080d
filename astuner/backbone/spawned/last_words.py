"""The few lines of a log that say why Ray's processes failed.

Ray repeats an exception in each process that waited for it, wraps it, and prints it
between the lines of all others. Shown is the last exception that is not merely Ray's
news of another process's death, with the frames that led to it.
"""

from __future__ import annotations

import re
from pathlib import Path

TAIL_BYTES = 400_000
FRAMES, MESSAGE_LINES = 3, 8
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PROCESS = re.compile(r"^\((?:[^()]* pid=\d+[^()]*|raylet|gcs_server)\) ?")
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Exit|Interrupt|Exceeded))(?::|$)"
)
_FRAME = re.compile(r'^ +File ".+", line \d+, in ')
SECOND_HAND = {
    "ActorDiedError",
    "ActorUnavailableError",
    "RayActorError",
    "RayTaskError",
    "WorkerCrashedError",
    "KeyboardInterrupt",
    "SystemExit",
    "CancelledError",
}
"""They tell that something else went wrong."""


def last_words(log: Path) -> str:
    """The last exception of the log, or its last lines if there is none."""
    lines = [_split(line) for line in _tail(log).splitlines()]
    found = [i for i, (_, line) in enumerate(lines) if _EXCEPTION.match(line)]
    first_hand = [i for i in found if _name(lines[i][1]) not in SECOND_HAND]
    if not found:
        return "\n".join([line for _, line in lines if line.strip()][-MESSAGE_LINES:])
    at = (first_hand or found)[-1]
    process = lines[at][0]
    before = [line for who, line in lines[:at] if who == process]
    after = [line for who, line in lines[at + 1 :] if who == process]
    return "\n".join([*_frames(before), lines[at][1], *_message(after)])


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _split(line: str) -> tuple[str, str]:
    """Which process printed it, by Ray's "(TaskRunner pid=123)" in front, and what."""
    plain = _COLOUR.sub("", line).rstrip()
    process = _PROCESS.match(plain)
    return (process[0], plain[process.end() :]) if process else ("", plain)


def _name(line: str) -> str:
    match = _EXCEPTION.match(line)
    return match[1] if match else ""


def _frames(before: list[str]) -> list[str]:
    """The innermost frames of the traceback that ends with these lines, with their code."""
    kept: list[str] = []
    frames = 0
    for line in reversed(before):
        if frames == FRAMES or not line.startswith(" "):
            break
        kept.append(line)
        frames += bool(_FRAME.match(line))
    return kept[::-1] if frames else []


def _message(after: list[str]) -> list[str]:
    """The further lines of an exception's message: up to a blank one or another traceback."""
    message: list[str] = []
    for line in after[: MESSAGE_LINES - 1]:
        if not line.strip() or line.startswith("Traceback") or _EXCEPTION.match(line):
            break
        message.append(line)
    return message
