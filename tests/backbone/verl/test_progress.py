"""What the launcher makes of a step that verl saved and never told of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from astuner.backbone.spawned.batches import BatchRecord, note_batch
from astuner.backbone.spawned.files import GroupRecord, spool_group
from astuner.backbone.spawned.states import last_known
from astuner.backbone.verl.progress import Follower
from astuner.config.schema import AstunerConfig
from astuner.trainer.checkpoints import TrainerState
from astuner.trainer.seams import Silent
from astuner.trainer.settings import TrainSettings
from astuner.types import Episode
from tests.tracking.records import episode

pytest.importorskip("cloudpickle", reason="cloudpickle comes with astuner[verl]")


@dataclass
class Kept(Silent):
    """What is told to sinks, to the episode store and to a person."""

    metrics: dict[int, Mapping[str, float]] = field(default_factory=dict)
    episodes: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics[step] = metrics

    def append(self, step: int, episodes: Sequence[Episode]) -> None:
        self.episodes[step] = len(episodes)

    def note(self, message: str) -> None:
        self.notes.append(message)


def follower(folder: Path, kept: Kept, step: int) -> Follower:
    settings = TrainSettings.from_config(AstunerConfig(), steps_per_epoch=1)
    state = TrainerState(step, settings.seed, settings.config_hash)
    return Follower(folder, settings, sinks=kept, episodes=kept, display=kept, state=state)


def spool(folder: Path, step: int, *groups: str) -> None:
    for name in groups:
        pair = tuple(
            episode(episode_id=f"{name}-{n}", group_id=name, reward=float(n), turn_rewards=None)
            for n in range(2)
        )
        spool_group(folder, GroupRecord(step, "train", name, pair, True, {}, f"uid-{name}"))


def test_steps_after_the_last_report_are_counted_from_their_groups(tmp_path: Path) -> None:
    folder, kept = tmp_path / "verl", Kept()
    folder.mkdir()
    for step, group in enumerate("abcd", start=1):
        spool(folder, step, group)
        note_batch(folder, BatchRecord(step, (f"uid-{group}",)))
    spool(folder, 4, "next")
    made = follower(folder, kept, step=1)
    made.catch_up(3)
    assert kept.episodes == {2: 2, 3: 2}
    assert [kept.metrics[step]["reward/mean"] for step in (2, 3)] == [0.5, 0.5]
    assert "speed/sampled_tokens_per_second" not in kept.metrics[2], "nobody knows"
    assert [note[:40] for note in kept.notes] == [
        "Step 2 was saved, but a kill came before",
        "Step 3 was saved, but a kill came before",
    ]
    assert made.state.totals.episodes == 4
    known = last_known(folder, 9)
    assert known is not None and (known.step, known.totals.episodes) == (3, 4)


def test_a_step_of_which_nothing_is_left_is_still_a_step(tmp_path: Path) -> None:
    folder, kept = tmp_path / "verl", Kept()
    folder.mkdir()
    made = follower(folder, kept, step=1)
    made.catch_up(2)
    assert kept.notes == ["Step 2 was saved, but a kill came before its report: all of it is lost."]
    assert made.state.step == 2 and made.state.totals.episodes == 0
    assert kept.episodes == {2: 0}
