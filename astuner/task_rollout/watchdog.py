"""Says what a run is waiting for when nothing moves any more: no silent hang.

A thread of its own looks on, so that it also speaks when the event loop is blocked.
Only a run with unfinished episodes can be stuck: while the trainer works alone it
keeps quiet. It ends nothing; deadlines do.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

log = logging.getLogger(__name__)
SHOWN = 3
"""Episodes that a report shows in full, the longest waiting first."""


class Live(Protocol):
    """An unfinished episode; `task_runner.live.LiveEpisode` is one."""

    @property
    def episode_id(self) -> str: ...
    @property
    def task_id(self) -> str: ...
    @property
    def waiting_for(self) -> str: ...
    @property
    def since(self) -> float:
        """`time.monotonic()` when it began to wait."""
        ...

    @property
    def where(self) -> Callable[[], str]:
        """Gives the user's lines it stands at."""
        ...


class Watchdog:
    """Reports when for `after` seconds no episode began or ended and the heartbeat stood
    still; again after twice as long, and so on. Use it as a context manager."""

    def __init__(
        self,
        live: Callable[[], Sequence[Live]],
        heartbeat: Callable[[], object],
        *,
        after: float = 60.0,
        report: Callable[[str], None] = log.warning,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`heartbeat` returns anything that changes while the engine works, such as the
        number of tokens sampled so far. Both callables must be safe in any thread."""
        self._live = live
        self._heartbeat = heartbeat
        self._after = after
        self._report = report
        self._clock = clock
        self._seen: object = None
        self._moved_at = clock()
        self._patience = after
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed.set()

    def check(self) -> str | None:
        """The report, if one is due now."""
        now, episodes = self._clock(), self._live()
        seen = (self._heartbeat(), frozenset(e.episode_id for e in episodes))
        if seen != self._seen or not episodes:
            self._seen, self._moved_at, self._patience = seen, now, self._after
            return None
        if now - self._moved_at < self._patience:
            return None
        self._patience *= 2
        return describe(episodes, now, now - self._moved_at)

    def _watch(self) -> None:
        while not self._closed.wait(min(self._after / 4, 5.0)):
            if report := self.check():
                self._report(report)


def describe(episodes: Sequence[Live], now: float, still_for: float) -> str:
    """Which episodes wait for what, since when and where, and what the other threads do."""
    ordered = sorted(episodes, key=lambda e: e.since)
    lines = [
        f"Nothing has moved for {still_for:.0f} s: no episode ended and no token was sampled. "
        f"{len(episodes)} episodes are waiting:"
    ]
    for episode in ordered[:SHOWN]:
        lines.append(
            f"  {episode.episode_id} (task {episode.task_id}) waits for {episode.waiting_for} "
            f"since {now - episode.since:.0f} s"
        )
        lines += [f"    {line}" for line in episode.where().splitlines()]
    if len(ordered) > SHOWN:
        lines.append(f"  and {len(ordered) - SHOWN} more.")
    return "\n".join([*lines, "Other threads:", *_other_threads()])


def _other_threads() -> list[str]:
    """One line a thread that is not an episode's: its name and its innermost frame."""
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
    lines: list[str] = []
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if frame is None or thread.name.startswith("episode") or thread.name == "watchdog":
            continue
        code = frame.f_code
        lines.append(f"  {thread.name}: {code.co_filename}:{frame.f_lineno} in {code.co_qualname}")
    return lines
