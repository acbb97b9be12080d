"""Groups that have ended, until it is known which step trained them.

Which one did is what the trainer's sampler has noted (`spawned.batches`), by verl's own
name of each group. verl's checkpoint holds the rows of groups that had ended and were not
trained yet, and a resumed run trains on them; their episodes are here alone. So the file
of a group stays until a checkpoint is newer than the step that trained it, and a resumed
run reads what is left.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from astuner.backbone.spawned.batches import BATCHES, batch_record
from astuner.backbone.spawned.files import GroupRecord, SpoolReader
from astuner.backbone.spawned.lines import LineReader
from astuner.types import Episode


@dataclass(frozen=True)
class Taken:
    """What ended with a step."""

    records: list[GroupRecord] = field(default_factory=list[GroupRecord])
    """Trained, or replaced because nothing could be learnt from them."""
    stale: list[GroupRecord] = field(default_factory=list[GroupRecord])
    """Thrown away because they were too old."""


class Waiting:
    """Reads a run's folder. Not thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.validation: defaultdict[int, list[Episode]] = defaultdict(list[Episode])
        """Episodes by the step that they validate."""
        self._spool = SpoolReader(folder)
        self._lines = LineReader(folder / BATCHES)
        self._groups: dict[str, tuple[Path, GroupRecord]] = {}
        self._noted: dict[str, tuple[int, bool]] = {}
        """verl's name of a group -> the step that took it, and whether to train on it."""
        self._saved: int | None = None
        """The step of the newest checkpoint."""
        self._kept: set[Path] = set()
        """Files that a resume from it may need."""

    def new(self, saved: int | None) -> list[GroupRecord]:
        """What has come since the last call. `saved` is the step of the newest checkpoint, looked
        up before: groups that come later are not in it."""
        for batch in map(batch_record, self._lines.new()):
            self._noted |= dict.fromkeys(batch.left_out, (batch.step, False))
            self._noted |= dict.fromkeys(batch.groups, (batch.step, True))
        found = self._spool.new_files()
        for path, record in found:
            self._add(path, record)
        if saved != self._saved:
            self._saved = saved
            before, self._kept = self._kept, {path for path, _ in self._groups.values()}
            _delete(*(before - self._kept))
        return [record for _, record in found]

    def _add(self, path: Path, record: GroupRecord) -> None:
        if record.split == "validation":
            self.validation[record.step] += record.episodes
            _delete(path)
            return
        if (earlier := self._groups.get(record.group_id)) is not None:
            self._let_go(earlier[0])  # a resumed run has rolled it out again
        self._groups[record.group_id] = path, record

    def take(self, step: int) -> Taken:
        """What ended with the step that is finished, and with earlier ones if it came late."""
        taken = Taken()
        for path, record in list(self._groups.values()):
            noted, trained = self._noted.get(record.name, (step + 1, False))
            if noted > step:
                continue
            del self._groups[record.group_id], self._noted[record.name]
            self._let_go(path, step)
            (taken.records if trained or not record.kept else taken.stale).append(record)
        return taken

    def knows(self, step: int) -> bool:
        """Whether it was noted what this step was trained on."""
        return any(trained and at == step for at, trained in self._noted.values())

    def _let_go(self, path: Path, step: int | None = None) -> None:
        """Of a group that `step` trained, or none."""
        in_weights = step is not None and self._saved is not None and step <= self._saved
        if in_weights or path not in self._kept:
            _delete(path)


def _delete(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
