"""Checkpoints that are either whole or not there.

`checkpoint-000010/` holds what `Policy.save` wrote and `trainer_state.json`;
`rolling-000011/` is the same, and gives way to the next one of either kind. Each is
written under a temporary name, flushed to disk and renamed, and only then are older
ones deleted: whenever the process is killed, `latest` finds the newest whole one.
Nothing here knows what is in the policy's files.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from astuner.engine.protocol import Policy
from astuner.errors import CheckpointError
from astuner.trainer.seams import EvalResult
from astuner.trainer.settings import TrainSettings
from astuner.trainer.totals import Totals

log = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
FORMAT = 1
_WHOLE = re.compile(r"(checkpoint|rolling)-\d{6,}")
_UNFINISHED = ".unfinished-"
"""Prefix of folders being written or deleted; left behind only by a killed process."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """All that a run has to know, besides the weights, to go on."""

    step: int
    """Completed steps."""
    seed: int
    config_hash: str
    totals: Totals = field(default_factory=Totals)
    evals: Mapping[int, EvalResult] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainerState:
        """Raises ValueError, KeyError or TypeError for anything `to_json` did not write."""
        data = json.loads(text)
        if data.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}; another version of astuner wrote it")
        data["totals"] = Totals(**data["totals"])
        data["evals"] = {int(step): EvalResult(**e) for step, e in data["evals"].items()}
        return cls(**data)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    state: TrainerState


def check_resumable(checkpoint: Checkpoint, settings: TrainSettings) -> str | None:
    """Raises CheckpointError if the run cannot go on as these settings say; returns a
    warning if it can, but not as it began."""
    seed = checkpoint.state.seed
    if seed != settings.seed:
        raise CheckpointError(
            f"{checkpoint.path} was trained with seed {seed}, but the config says "
            f"{settings.seed}: the order of tasks would change. Set seed: {seed}, or start a "
            "new run."
        )
    if checkpoint.state.config_hash != settings.config_hash:
        return (
            f"The config is not the one {checkpoint.path.name} was trained with; the run goes "
            "on with the new one."
        )
    return None


class Checkpoints:
    """The checkpoints of one run, in one folder. One process writes there at a time."""

    def __init__(self, folder: Path, keep: int = 0) -> None:
        """`keep` is how many of the newest to keep, not counting a rolling one; 0 keeps all."""
        self.folder = folder
        self.keep = keep

    async def save(self, policy: Policy, state: TrainerState, *, rolling: bool = False) -> Path:
        """Write a checkpoint of this step, then delete what is too old.

        Raises CheckpointError when it cannot be written (disk full, no permission);
        the earlier ones are then untouched.
        """
        name = f"{'rolling' if rolling else 'checkpoint'}-{state.step:06d}"
        unfinished = self.folder / f"{_UNFINISHED}{name}"
        with self._explained(state.step, unfinished):
            self._clear_unfinished()
            unfinished.mkdir(parents=True)
            await policy.save(unfinished, optimizer=True)
            (unfinished / STATE_FILE).write_text(state.to_json())
            await asyncio.to_thread(_flush, unfinished)
            self._put_in_place(unfinished, self.folder / name)
        await asyncio.to_thread(self._delete_old, state.step)
        return self.folder / name

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; what cannot be read is passed over, with a warning."""
        for path in reversed(self._whole()):
            try:
                return self.read(path)
            except CheckpointError as error:
                log.warning("Passing over a checkpoint. %s", error)
        return None

    def read(self, path: Path) -> Checkpoint:
        """Raises CheckpointError when there is no valid trainer state in the folder."""
        try:
            state = TrainerState.from_json((path / STATE_FILE).read_text())
        except OSError as error:
            raise CheckpointError(
                f"{path} is not a checkpoint: {STATE_FILE} cannot be read ({error.strerror})."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path / STATE_FILE} is damaged ({type(error).__name__}: {error}). "
                "Delete this checkpoint folder to resume from the one before it."
            ) from error
        return Checkpoint(path, state)

    # ------------------------------------------------------------ inside

    def _whole(self) -> list[Path]:
        """Checkpoint folders, oldest step first."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if _WHOLE.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=_step_of)

    @contextmanager
    def _explained(self, step: int, unfinished: Path) -> Generator[None]:
        """Whatever goes wrong, no half-written folder stays; and the user learns what does."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = ", ".join(p.name for p in self._whole()) or "none"
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {self.folder}: {error}. "
                f"Whole checkpoints that are still there: {kept}. "
                "Make room (or fix the folder), then go on with --resume."
            ) from error
        finally:
            if unfinished.exists():  # cancelled, or an error that is not about the disk
                shutil.rmtree(unfinished, ignore_errors=True)

    def _put_in_place(self, unfinished: Path, final: Path) -> None:
        if final.exists():  # a resumed run does this step again
            self._delete(final)
        unfinished.rename(final)
        _flush_folder(self.folder)

    def _delete_old(self, step: int) -> None:
        """Counts from this step back; later ones are of a run that was wound back."""
        upto = [p for p in self._whole() if _step_of(p) <= step]
        lasting = [p for p in upto if p.name.startswith("checkpoint")]
        surplus = lasting[: -self.keep] if self.keep else []
        surplus += [p for p in upto if p not in lasting and p != upto[-1]]
        for path in surplus:
            try:
                self._delete(path)
            except OSError as error:
                log.warning("An old checkpoint cannot be deleted: %s", error)

    def _delete(self, path: Path) -> None:
        """Under another name first, so that a half-deleted one is never taken for whole."""
        doomed = path.with_name(f"{_UNFINISHED}deleted-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _clear_unfinished(self) -> None:
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _flush(folder: Path) -> None:
    """Everything below the folder is on the disk when this returns."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _flush_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """The folder's list of names is on the disk (where the system can promise that)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
