"""verl's driver process: `python -m astuner.backbone.verl.driver FOLDER`.

Composes verl's configuration from the folder's settings, starts or joins Ray, and runs
verl's own `run_ppo` with a task runner that reports and can be stopped. An error of ours
is left in the folder for the launcher; any other one in the log. Ends with the training.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astuner.backbone.spawned.files import SETTINGS, Stage, give_up, read_job, write_stage
from astuner.backbone.verl.ray_cluster import environment, init_arguments
from astuner.backbone.verl.sections import AGENT_LOOP, ROLLOUT
from astuner.errors import AstunerError

AGENT_LOOPS = "agent_loops.yaml"
LOOP = f"- name: {AGENT_LOOP}\n  _target_: astuner.backbone.verl.agent_loop.EpisodeLoop\n"


def main(folder: Path) -> int:
    """The exit code: 1 after an error that `gave_up` tells."""
    try:
        _train(folder)
    except AstunerError as error:
        give_up(folder, error)
        print(f"astuner: {type(error).__name__}: {error}", flush=True)
        return 1
    return 0


def _train(folder: Path) -> None:
    write_stage(folder, Stage("loading verl"))
    settings = with_loop(folder, json.loads((folder / SETTINGS).read_text()))
    from astuner.backbone.verl.compose import compose

    config = compose(settings)
    _set_ray(config, settings, folder)
    import ray  # pyright: ignore[reportMissingImports]
    from verl.trainer.main_ppo import run_ppo  # pyright: ignore[reportMissingImports]

    from astuner.backbone.verl.task_runner import task_runner_class

    address = config.ray_kwargs.ray_init.address
    joins = address != "local"
    write_stage(folder, Stage(f"joining Ray at {address}" if joins else "starting Ray"))
    try:
        run_ppo(config, task_runner_class())
    finally:
        ray.shutdown()


def with_loop(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with our agent loop in a file that verl's processes of all machines see."""
    path = folder / AGENT_LOOPS
    path.write_text(LOOP)
    return {**settings, f"{ROLLOUT}.agent.agent_loop_config_path": str(path)}


def _set_ray(config: Any, settings: Mapping[str, Any], folder: Path) -> None:
    """What the user has set himself stays."""
    from omegaconf import OmegaConf

    address = read_job(folder).config.trainer_common.ray_address
    device = str(settings["trainer.device"])
    arguments = init_arguments(settings, address, device, os.environ["RAY_TMPDIR"])
    for name, value in arguments.items():
        key = f"ray_kwargs.ray_init.{name}"
        if key not in settings:
            OmegaConf.update(config, key, value, force_add=True)
    for name, value in environment(folder, device).items():
        key = f"ray_kwargs.ray_init.runtime_env.env_vars.{name}"
        if key not in settings:
            OmegaConf.update(config, key, value, force_add=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
