"""Shows a person where the run is: a live line in a terminal, plain lines elsewhere.

Called by the trainer and the backbones from any thread; never blocks, never fails a
run. A notebook, a pipe or CI gets plain lines. It shows what it is told and computes
only the time that is left.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Task as ProgressTask
from rich.text import Text

from astuner.tracking.console import line, target_rewards
from astuner.tracking.summary import duration
from astuner.types import Episode

NAMES = {
    "rollout": "rolling out",
    "train": "training",
    "publish": "publishing",
    "checkpoint": "saving",
    "eval": "validating",
}
"""Stages of the trainer, in words; other names are shown as they are."""
RECENT = 8
"""Steps that the time left is estimated from."""


class Scored(Protocol):
    """A validation's result."""

    @property
    def score(self) -> float: ...
    @property
    def num(self) -> int: ...


class _Counted(ProgressColumn):
    """ "12/64 episodes", once it is known how many there are."""

    def render(self, task: ProgressTask) -> Text:
        if task.total is None:
            return Text()
        return Text(f"{task.completed:.0f}/{task.total:.0f} {task.fields['unit']}".rstrip())


class RunDisplay:
    """Live progress of one run. `close` it, or use it as a context manager."""

    def __init__(
        self,
        console: Console | None = None,
        *,
        step_lines: bool = False,
        episodes: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`step_lines` prints a line for each step. `episodes` says how many a stage
        consists of, e.g. {"rollout": 64}. The live lines start with the first stage."""
        self.console = console or Console()
        self._step_lines = step_lines
        self._episodes = episodes or {}
        self._clock = clock
        self._stage = ""
        self._facts: dict[str, str] = {}
        self._failures: Counter[str] = Counter()
        self._times: deque[float] = deque(maxlen=RECENT + 1)
        self._progress: Progress | None = None
        self._steps: TaskID | None = None
        self._inner: TaskID | None = None
        self._closed = False

    def __enter__(self) -> RunDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- what is told

    def stage(self, name: str, step: int = 0, total: int = 0) -> None:
        """A stage begins. `total` is the number of steps of the run, if it is known."""
        words = self._stage = NAMES.get(name, name)
        if name == "rollout" and not self._times:
            self._times.append(self._clock())  # the first step begins
        self._start()
        if self._progress is None or self._inner is None or self._steps is None:
            if name not in NAMES or name == "eval":
                self._print(f"{words} ...")
            return
        if total:
            self._progress.update(self._steps, total=total, visible=True)
        self._progress.remove_task(self._inner)
        self._inner = _stage_task(self._progress, words, self._episodes.get(name))

    def expect(self, total: int) -> None:
        """The running stage consists of so many episodes; `advance` counts them."""
        if self._progress is not None and self._inner is not None:
            self._progress.update(self._inner, total=total, completed=0)

    def advance(self, count: int = 1) -> None:
        if self._progress is not None and self._inner is not None:
            self._progress.advance(self._inner, count)

    def episode(self, episode: Episode) -> None:
        """An episode has ended; the first failure of each kind is shown in full."""
        self.advance()
        failure = episode.failure
        if failure is None:
            return
        self._failures[failure.kind] += 1
        if self._failures[failure.kind] == 1:
            self.note(f"Episode {episode.episode_id} failed ({failure.kind}): {failure.message}")
            if failure.traceback:
                self._print(Text(failure.traceback, "dim"))
            self._print(Text("(Further failures of this kind are only counted.)", "dim"))
        self._show(failures=f"[red]{sum(self._failures.values())} failed[/]")

    def step_done(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """A training step is completed."""
        self._times.append(self._clock())
        left = self._seconds_left(total - step)
        if (reward := metrics.get("reward/mean")) is not None:
            shown = [("reward", reward), *target_rewards(metrics).items()]
            self._facts["reward"] = "  ".join(f"{n} [green]{r:.3f}[/]" for n, r in shown)
        if (speed := metrics.get("speed/sampled_tokens_per_second")) is not None:
            self._facts["speed"] = f"{speed:,.0f} tok/s"
        self._show(eta=f"{duration(left)} left" if step < total else "")
        if self._progress is not None and self._steps is not None:
            self._progress.update(self._steps, completed=step, total=total, visible=True)
        if self._step_lines:
            self._print(line(step, metrics).append(f"  of {total}, {duration(left)} left", "dim"))

    def evaluated(self, step: int, result: Scored) -> None:
        """The held-out score after so many steps."""
        self._show(held_out=f"held-out [bold cyan]{result.score:.3f}[/]")
        self._print(
            Text.assemble(
                f"held-out score after {step} steps: ",
                (f"{result.score:.3f}", "bold cyan"),
                (f" (mean of {result.num})", "dim"),
            )
        )

    def waiting(self, what: str, seconds: float) -> None:
        """Something has not come for so long."""
        if self._progress is not None and self._inner is not None:
            self._progress.update(self._inner, description=f"{self._stage} ({duration(seconds)})")
        elif seconds >= 60:
            self._print(f"{what}: waiting for {duration(seconds)}")

    def note(self, message: str) -> None:
        """A sentence worth reading."""
        self._print(Text(message, "yellow"))

    def close(self) -> None:
        """Leave the terminal as it was. Safe to call twice."""
        self._closed = True
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    # ---------------------------------------------------------------- how it is shown

    def _start(self) -> None:
        """Show live lines, once, where there is a terminal for them."""
        shown = self.console.is_terminal and not self.console.is_jupyter
        if shown and self._progress is None and not self._closed:
            self._progress = self._live()
            self._progress.start()

    def _live(self) -> Progress:
        progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            _Counted(),
            TextColumn("{task.fields[facts]}"),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self._steps = progress.add_task("step", total=None, visible=False, facts="", unit="")
        self._inner = _stage_task(progress, "starting", None)
        return progress

    def _show(self, **facts: str) -> None:
        self._facts |= facts
        if self._progress is not None and self._steps is not None:
            shown = "  ".join(fact for fact in self._facts.values() if fact)
            self._progress.update(self._steps, facts=shown)

    def _print(self, what: str | Text) -> None:
        self.console.print(what, highlight=False, soft_wrap=True)

    def _seconds_left(self, steps: int) -> float:
        spans = len(self._times) - 1
        return max(0, steps) * (self._times[-1] - self._times[0]) / max(1, spans)


def _stage_task(progress: Progress, words: str, total: int | None) -> TaskID:
    return progress.add_task(words, total=total, facts="", unit="episodes")
