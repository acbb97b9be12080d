"""Writes what verl's processes write, without verl: `python fake_verl.py FOLDER`.

Two groups of two episodes a step, one validation episode where one is due, a checkpoint
of the base model's own weights with 1 added for each step. FAKE_VERL says how it goes:
"well", "slowly" (a step takes 0.3 s), "hangs:N", "fails:N", "fails_late:N"
(saved, but not reported) "gives_up:N" or "has_a_bug:N" (in step N).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from astuner.backbone.spawned.batches import BatchRecord, note_batch
from astuner.backbone.spawned.files import (
    METRICS,
    SETTINGS,
    STOP,
    GroupRecord,
    Stage,
    give_up,
    read_job,
    sign_of_life,
    spool_group,
    write_stage,
)
from astuner.backbone.spawned.stacks import answer_for_stacks
from astuner.errors import UserCodeError
from astuner.types import Episode
from tests.spans import spans_of
from tests.tracking.records import call, episode, sample

PROGRESS = {"actor/pg_loss": 0.5, "actor/grad_norm": 2.0, "actor/lr": 1e-3, "perf/mfu": None}
TIMES = {"gen": 0.5, "old_log_prob": 0.1, "update_actor": 0.2, "update_weights": 0.05, "step": 1.0}


def group(step: int, place: int, split: Any = "train") -> GroupRecord:
    name = f"{split}-{step}-{place}"
    versions = np.array([step - 1, step - 1], np.int32)
    episodes: list[Episode] = []
    for repeat, reward in enumerate((0.0, 1.0) if split == "train" else (step / 10,)):
        key = f"{name}-{repeat}"
        own = call(call_id=key, episode_id=key, weight_versions=versions)
        spans = spans_of([-1, -1, 0, 0], [-1, -1, *versions])
        one = sample(sample_id=key, episode_id=key, group_id=name, spans=spans)
        values: dict[str, Any] = {"episode_id": key, "group_id": name, "split": split}
        values |= {"repeat_index": repeat, "reward": reward, "is_success": None}
        episodes.append(episode(calls=(own,), samples=(one,), turn_rewards=None, **values))
    counters = {"rollout/calls": 2.0}
    return GroupRecord(step, split, name, tuple(episodes), True, counters, f"uid-{name}")


class Fake:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = json.loads((folder / SETTINGS).read_text())
        self.job = read_job(folder)
        how, _, at = os.environ["FAKE_VERL"].partition(":")
        self.how, self.at = how, int(at or 0)
        self.checkpoints = Path(self.settings["trainer.default_local_dir"])
        self.metrics = (folder / METRICS).open("a")

    def run(self) -> None:
        write_stage(self.folder, Stage("starting"))
        first, total = self.resume(), self.settings["trainer.total_training_steps"]
        if self.settings["trainer.val_before_train"]:
            self.log(first, self.validate(first))
        for step in range(first + 1, total + 1):
            write_stage(self.folder, Stage("rollout", step, total))
            groups = [group(step, place) for place in range(2)]
            for one in groups:
                spool_group(self.folder, one)
            note_batch(self.folder, BatchRecord(step, tuple(one.name for one in groups)))
            self.misbehave(step)
            self.save(step)
            seconds = {f"timing_s/{name}": value for name, value in TIMES.items()}
            evaluated = self.validate(step) if step == total else {}
            if step == self.at and self.how == "fails_late":
                raise RuntimeError("killed before its report")
            self.log(step, {"training/global_step": step, **PROGRESS, **seconds, **evaluated})
            if (self.folder / STOP).exists():
                return

    def misbehave(self, step: int) -> None:
        if self.how == "slowly":
            time.sleep(0.3)
        if step == self.at and self.how == "hangs":
            write_stage(self.folder, Stage("publish", step, 9))
            sign_of_life(self.folder, "sending weights")
            time.sleep(600)
        if step == self.at and self.how == "fails":
            raise RuntimeError("the trainer has no more cheese")
        if step == self.at and self.how == "gives_up":
            give_up(self.folder, UserCodeError("every episode failed"))
            time.sleep(600)
        if step == self.at and self.how == "has_a_bug":
            give_up(self.folder, KeyError("a bug of astuner's"))
            time.sleep(600)

    def validate(self, step: int) -> dict[str, float]:
        spool_group(self.folder, group(step, 0, "validation"))
        return {"val-core/astuner/reward/mean@1": 0.1, "timing_s/testing": 0.25}

    def log(self, step: int, data: dict[str, Any]) -> None:
        self.metrics.write(json.dumps({"step": step, "data": data}) + "\n")
        self.metrics.flush()

    def resume(self) -> int:
        if self.settings["trainer.resume_mode"] == "disable":
            return 0
        return int((self.checkpoints / "latest_checkpointed_iteration.txt").read_text())

    def save(self, step: int) -> None:
        base = load_file(Path(self.job.config.model.path) / "model.safetensors")
        shards = self.checkpoints / f"global_step_{step}" / "actor"
        shards.mkdir(parents=True, exist_ok=True)
        state = {name: value + step for name, value in base.items()}
        torch.save(state, shards / "model_world_size_1_rank_0.pt")
        (shards / "fsdp_config.json").write_text('{"world_size": 1}')
        (self.checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))


if __name__ == "__main__":
    answer_for_stacks(Path(sys.argv[1]))
    Fake(Path(sys.argv[1])).run()
