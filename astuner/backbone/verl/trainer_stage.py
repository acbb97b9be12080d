"""Which stage verl's trainer is in, read from its attributes (verl 0.9.1, trainer/ppo/v1).

While it starts, each part it has built is an attribute; in a step, each part that is done
has left its seconds in `timing_raw`. Only looks.
"""

from __future__ import annotations

from typing import Any

from astuner.backbone.spawned.files import Stage

STARTING = (
    ("checkpoint_manager", "bringing the weights to the rollout servers"),
    ("reward_loop_manager", "starting the rollout servers"),
    ("actor_rollout_wg", "loading the model into verl's trainers"),
    ("train_dataloader", "starting verl's workers"),
)
"""The newest first: once this attribute is there, that is what goes on."""


def stage_of(trainer: Any) -> Stage:
    """`trainer` is a PPOTrainer, or None before there is one."""
    if trainer is None:
        return Stage("starting verl's trainer")
    if not hasattr(trainer, "logger"):  # set at the start of `fit`
        words = (words for attribute, words in STARTING if hasattr(trainer, attribute))
        return Stage(next(words, "starting verl's trainer"))
    total = int(trainer.total_training_steps)
    step = min(int(trainer.global_steps), total)  # one more once it is done
    if not hasattr(trainer, "prev_step_profile"):  # set after the validation before training
        return Stage("eval", step, total)
    done: set[str] = set(getattr(trainer, "timing_raw", ()))
    return Stage(_of_step(trainer, step, done), step, total)


def _of_step(trainer: Any, step: int, done: set[str]) -> str:
    """What has not been done yet, in verl's order; a due save or validation is between."""
    if "gen" not in done:
        return "rollout"
    if "update_actor" not in done:
        return "train"
    last, schedule = trainer.total_training_steps, trainer.config.trainer
    if _due(step, last, schedule.save_freq) and not {"save_checkpoint", "update_weights"} & done:
        return "checkpoint"
    if "update_weights" not in done or not _due(step, last, schedule.test_freq):
        return "publish"
    return "eval"


def _due(step: int, last: int, every: int) -> bool:
    return every > 0 and (step >= last or step % every == 0)
