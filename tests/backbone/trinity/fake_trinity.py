"""Writes what Trinity's processes write, without Trinity: `python fake_trinity.py FOLDER`.

Two groups a step, a validation at the start, a checkpoint after each step. FAKE_TRINITY says
how it goes: "well", "slowly" (a step takes 0.3 s), "short:N" (ends after step N and says that
all is well), "breaks:N" (a half breaks off in step N, and the other waits) or "gives_up:N".
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from astuner.backbone.spawned.batches import BatchRecord, note_batch
from astuner.backbone.spawned.files import (
    SETTINGS,
    STOP,
    GroupRecord,
    Stage,
    give_up,
    read_job,
    spool_group,
    write_stage,
)
from astuner.backbone.trinity.accounts import note_metrics
from astuner.backbone.trinity.checkpoints import ADAPTER, job_folder
from astuner.backbone.trinity.service_child import DATA
from astuner.backbone.trinity.service_child import FOLDER as SERVICE
from astuner.errors import UserCodeError
from astuner.service.names import parse_path
from tests.backbone.trinity.made_up import group

BROKEN = """(Explorer pid=7) ERROR Error in Explorer: Traceback (most recent call last):
(Explorer pid=7)   File "x.py", line 1, in explore
(Explorer pid=7)     await cheese()
(Explorer pid=7) ValueError: the explorer has no more cheese
"""


class Fake:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = json.loads((folder / SETTINGS).read_text())
        self.run_dir = read_job(folder).run_dir
        how, _, at = os.environ["FAKE_TRINITY"].partition(":")
        self.how, self.at = how, int(at or 0)

    def run(self) -> None:
        write_stage(self.folder, Stage("starting"))
        first, total = self.resume(), self.settings["trainer.total_steps"]
        if self.settings["explorer.eval_on_startup"] and not first:
            self.spool("validation", 0, "v0")
        for step in range(first + 1, total + 1):
            self.misbehave(step)
            names = [f"s{step}-{place}" for place in range(2)]
            for name in names:
                self.spool("train", step, name)
            note_batch(self.folder, BatchRecord(step, tuple(names)))
            self.save(step)
            note_metrics(self.folder, "trainer", step, {"actor/ppo_kl": 0.0, "time/train_step": 1})
            ends = self.how == "short" and step == self.at
            if ends or (self.folder / STOP).exists():
                return

    def resume(self) -> int:
        if not self.settings["continue_from_checkpoint"]:
            return 0
        return int((job_folder(self.run_dir) / "latest_checkpointed_iteration.txt").read_text())

    def spool(self, split: str, step: int, name: str) -> None:
        made = group(max(0, step - 1)).episodes
        own = [replace(e, group_id=name, episode_id=f"{name}-{e.episode_id}") for e in made]
        episodes = tuple(own)
        spool_group(self.folder, GroupRecord(step, split, name, episodes, True))  # type: ignore[arg-type]

    def misbehave(self, step: int) -> None:
        if self.how == "slowly":
            time.sleep(0.3)
        if step == self.at and self.how == "breaks":
            print(BROKEN, flush=True)
            time.sleep(600)
        if step == self.at and self.how == "gives_up":
            give_up(self.folder, UserCodeError("every episode failed"))
            time.sleep(600)

    def save(self, step: int) -> None:
        path = f"tinker://{'0' * 32}:train:0/weights/state-{step}"
        state = job_folder(self.run_dir) / f"global_step_{step}"
        data = self.folder / SERVICE / DATA
        weights = parse_path(path).folder(data / "checkpoints", "0")
        for folder in (state, weights):
            folder.mkdir(parents=True, exist_ok=True)
        (state / "remote_checkpoint_path.txt").write_text(path)
        for name in ADAPTER:
            (weights / name).write_text(str(step))
        (state.parent / "latest_checkpointed_iteration.txt").write_text(str(step))


if __name__ == "__main__":
    Fake(Path(sys.argv[1])).run()
