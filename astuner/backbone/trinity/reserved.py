"""Trinity's settings that astuner's own parts stand on, and what to set in their place.

Whoever gives one of them under `astuner.trinity` would change nothing, or break what he
does not see. Pure, and without Trinity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from astuner.backbone.spawned.choices import Problem

INSTEAD: Mapping[str, str] = {
    "mode": "use `astuner.rollout.mode`",
    "project": "checkpoints lie in the run's folder under this name",
    "name": "checkpoints lie in the run's folder under this name",
    "group": "checkpoints lie in the run's folder under this name",
    "stages": "a run of astuner is one stage",
    "checkpoint_root_dir": "use `astuner.experiment_dir` and `astuner.experiment_name`",
    "continue_from_checkpoint": "use --resume",
    "model.model_path": "use `astuner.model.path`",
    "model.temperature": "episodes are sampled with `astuner.rollout.temperature`",
    "model.top_p": "episodes are sampled with `astuner.rollout.top_p`",
    "model.top_k": "episodes are sampled with `astuner.rollout.top_k`",
    "model.max_response_tokens": "use `astuner.rollout.max_response_length_in_one_turn`",
    "model.tinker.enable": "use `astuner.rollout.engine`",
    "model.tinker.base_url": "the service is started with the run",
    "cluster.ray_address": "use `astuner.trainer_common.ray_address`, or --ray-address",
    "algorithm.repeat_times": "use `astuner.rollout.num_repeat`",
    "buffer.explorer_input": "tasks and workflow are `astuner.task_reader` and `astuner.rollout`",
    "buffer.batch_size": "use `astuner.data.train_batch_size`",
    "buffer.total_steps": "use `astuner.trainer_common.total_steps`",
    "buffer.total_epochs": "use `astuner.trainer_common.total_epochs`",
    "trainer.total_steps": "use `astuner.trainer_common.total_steps`",
    "trainer.trainer_type": "use `astuner.rollout.engine`",
    "explorer.rollout_model.engine_type": "use `astuner.rollout.engine`",
    "monitor.monitor_type": "Trinity's metrics go on to the sinks in "
    "`astuner.trainer_common.logger`",
}
"""Setting, or section, that astuner's own parts stand on -> what to set instead."""
ADVANTAGE, ADVANTAGE_ARGS = "algorithm.advantage_fn", "algorithm.advantage_fn_args"
NO_ADVANTAGE_ARGS = (
    "is not for setting: use `astuner.trainer_common.algorithm`, or give a function of your own "
    "with `astuner.trinity.algorithm.advantage_fn`, which takes them."
)


def reserved(taken: Iterable[str]) -> Iterator[Problem]:
    """Of the keys that the user has set."""
    taken = list(taken)
    for key in taken:
        if f"{key}.".startswith(f"{ADVANTAGE_ARGS}.") and ADVANTAGE not in taken:
            yield f"trinity.{key}", NO_ADVANTAGE_ARGS
        for section, instead in INSTEAD.items():
            if f"{key}.".startswith(f"{section}."):
                yield f"trinity.{key}", f"is not for setting: {instead}."
            elif section.startswith(f"{key}."):
                yield f"trinity.{key}", "would replace a whole section: name the settings in it."
