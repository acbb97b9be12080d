"""From what verl's processes write to what every backbone reports (`spawned.following`).

verl's line of metrics after each step says that the step is finished, and holds verl's
numbers; which groups were trained in it, `waiting` knows. A validation is told of in the
line of its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astuner.backbone.report import saved_step
from astuner.backbone.spawned.files import METRICS, read_stage
from astuner.backbone.spawned.following import Follower as Following
from astuner.backbone.spawned.following import StepDone, counted, renamed
from astuner.backbone.spawned.lines import LineReader
from astuner.backbone.verl.waiting import Waiting
from astuner.trainer.settings import TrainSettings

STEP_DONE, VALIDATED = "training/global_step", "val-"
"""A key, and the beginning of keys, that only such a line has."""
NAMES = {
    "actor/pg_loss": "policy/loss",
    "actor/grad_norm": "policy/grad_norm",
    "actor/lr": "policy/lr",
    "actor/entropy": "policy/entropy",
    "actor/kl_loss": "policy/reference_kl",
    "actor/pg_clipfrac": "policy/clipped",
    "rollout_corr/k3_kl": "policy/sampler_kl",
    "rollout_corr/rollout_is_mean": "policy/tis_weight",
    "timing_s/gen": "seconds/rollout",
    "timing_s/update_weights": "seconds/publish",
    "timing_s/save_checkpoint": "seconds/checkpoint",
    "timing_s/step": "seconds/step",
}
"""verl's name -> ours, where both mean the same."""
TRAINING = ("old_log_prob", "ref", "adv", "update_actor")
"""verl's timers that make up our `seconds/train`."""


class Follower(Following):
    """Reads what is new and passes it on. Not thread-safe."""

    def __init__(self, folder: Path, settings: TrainSettings, **to: Any) -> None:
        """As every follower."""
        super().__init__(folder, settings, **to)
        self._lines = LineReader(folder / METRICS)
        self._waiting = Waiting(folder)

    def catch_up(self, step: int) -> None:
        """Begin after `step`, which verl has saved. What it did since the last step that was
        reported is counted from its groups: a kill came before verl told of it. Raises OSError.
        """
        self._waiting.new(None)
        self._waiting.validation.clear()  # is done again
        self._waiting.take(self.state.step)
        for missed in range(self.state.step + 1, step + 1):
            lost = "verl's metrics of it are" if self._waiting.knows(missed) else "all of it is"
            note = f"Step {missed} was saved, but a kill came before its report: {lost} lost."
            self.display.note(note)
            self._step_done(missed, {})

    def poll(self) -> None:
        """Everything that has come since the last call. Raises OSError when it cannot be kept."""
        self.show(read_stage(self.folder))
        saved = saved_step(self.folder.parent, "verl")
        lines = self._lines.new()  # first: the groups of a step are spooled before its line
        self.read(self._waiting.new(saved))
        for line in lines:
            self.reads += 1
            self._line(int(line["step"]), _numbers(line["data"]))

    def _line(self, step: int, verl: Mapping[str, float]) -> None:
        if STEP_DONE in verl:
            self._step_done(step, verl)
        if any(name.startswith(VALIDATED) for name in verl) and (
            episodes := self._waiting.validation.pop(step, [])
        ):
            self.validated(step, episodes, verl.get("timing_s/testing"))

    def _step_done(self, step: int, verl: Mapping[str, float]) -> None:
        taken = self._waiting.take(step)
        metrics = under_our_names(verl)
        counters = counted((r.counters for r in taken.records), taken.stale)
        self.step_done(
            StepDone(step, taken.records, metrics, counters, verl.get("timing_s/step", 0.0))
        )


def under_our_names(verl: Mapping[str, float]) -> dict[str, float]:
    """Where we have a name; and everything as `verl/NAME`."""
    ours = renamed(verl, NAMES, "verl")
    training = [verl[f"timing_s/{t}"] for t in TRAINING if f"timing_s/{t}" in verl]
    if training:
        ours["seconds/train"] = sum(training)
    return ours


def _numbers(data: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in data.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
