"""What Trinity's processes write, followed by the launcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from astuner.backbone.spawned.batches import BatchRecord, note_batch
from astuner.backbone.spawned.files import GroupRecord, spool_group
from astuner.backbone.spawned.states import state_at
from astuner.backbone.trinity.accounts import note_metrics
from astuner.backbone.trinity.progress import Follower
from astuner.config.schema import AstunerConfig
from astuner.tracking import RunDisplay
from astuner.trainer import TrainSettings
from astuner.trainer.checkpoints import TrainerState
from astuner.types import Episode
from tests.backbone.trinity.made_up import group

pytest.importorskip("cloudpickle", reason="cloudpickle comes with astuner[trinity]")


class Kept:
    """Metrics and episodes, as they come."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}
        self.episodes: list[tuple[int, list[str]]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.setdefault(step, {}).update(metrics)

    def append(self, step: int, episodes: Sequence[Episode]) -> None:
        self.episodes.append((step, [e.episode_id for e in episodes]))


def follower(folder: Path) -> tuple[Follower, Kept]:
    config, kept = AstunerConfig(), Kept()
    config.trainer_common.total_steps = 3
    settings = TrainSettings.from_config(config, steps_per_epoch=1)
    made = Follower(
        folder,
        settings,
        validations=4,
        sinks=kept,
        episodes=kept,
        display=RunDisplay(),
        state=TrainerState(0, 0, "hash"),
    )
    return made, kept


def spool(folder: Path, name: str, **more: Any) -> None:
    fields: dict[str, Any] = {"step": 1, "split": "train", "kept": True} | more
    made = group()
    episodes = tuple(replace(e, group_id=name) for e in made.episodes)
    spool_group(folder, GroupRecord(group_id=name, episodes=episodes, **fields))


def test_a_step_is_what_it_was_trained_on(tmp_path: Path) -> None:
    followed, kept = follower(tmp_path)
    spool(tmp_path, "old", counters={"rollout/calls": 2.0})
    spool(tmp_path, "new", counters={"rollout/calls": 3.0})
    spool(tmp_path, "next")
    note_batch(tmp_path, BatchRecord(1, ("new",), ("old",)))
    data = {"actor/pg_loss": 0.25, "actor/ppo_kl": 1e-9, "time/train_step": 2.0, "words": "no"}
    note_metrics(tmp_path, "trainer", 1, data)
    followed.poll()
    metrics = kept.metrics[1]
    expected = {
        "policy/loss": 0.25,
        "trinity/actor/pg_loss": 0.25,
        "policy/ppo_kl": 1e-9,
        "seconds/train": 2.0,
        "seconds/step": 2.0,
        "groups/trained": 1.0,
        "tokens/trained": 6.0,  # 2 + 2 + 1 + 1 of the three episodes that ended well
        "reward/mean": 0.5,
        "episodes/failed": 1.0,
        "rollout/calls": 5.0,
        "rollout/groups_too_stale": 1.0,
        "tokens_masked/too_stale": 5.0,
        "policy/lr": AstunerConfig().trainer_common.optim.lr,
    }
    assert {name: metrics[name] for name in expected} == expected
    assert "trinity/words" not in metrics
    assert kept.episodes == [(1, ["e0", "e1", "e2", "e3"])]
    assert (followed.state.step, followed.state.totals.tokens_trained) == (1, 6)
    assert state_at(tmp_path, 1, TrainerState(0, 0, "x")).totals == followed.state.totals


def test_a_validation_is_told_by_the_weights_it_was_played_with(tmp_path: Path) -> None:
    followed, kept = follower(tmp_path)
    spool(tmp_path, "v", step=3, split="validation")
    followed.poll()
    assert followed.state.evals[2].score == pytest.approx(1.5 / 4)  # 1 + 0 + 0.5 + a failure
    assert kept.metrics[2]["eval/num"] == 4.0


def test_anything_new_is_a_sign_of_life(tmp_path: Path) -> None:
    followed, _ = follower(tmp_path)
    before = followed.signs()
    spool(tmp_path, "g")
    followed.poll()
    assert followed.signs() != before
