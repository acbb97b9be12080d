"""Trinity's driver process: `python -m astuner.backbone.trinity.driver FOLDER`.

Composes Trinity's configuration from the folder's settings, starts or joins Ray, and runs
Trinity's own `run_stage`. An error of ours is left in the folder for the launcher; any other
one in the log. Ends with the training; whether that did what it should, the launcher sees.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from astuner.backbone.spawned.files import SETTINGS, Stage, give_up, read_job, write_stage
from astuner.backbone.spawned.ray_cluster import own_cluster
from astuner.backbone.trinity.cluster import process_environment
from astuner.errors import AstunerError


def main(folder: Path) -> int:
    """The exit code: 1 after an error, which `gave_up` or the log tells."""
    try:
        return 0 if _train(folder) else 1
    except AstunerError as error:
        give_up(folder, error)
        print(f"astuner: {type(error).__name__}: {error}", flush=True)
        return 1


def _train(folder: Path) -> bool:
    """Whether Trinity says that it went well."""
    write_stage(folder, Stage("loading Trinity"))
    from astuner.backbone.trinity.compose import compose

    config = compose(json.loads((folder / SETTINGS).read_text()))
    import ray  # pyright: ignore[reportMissingImports]
    from trinity.cli.launcher import run_stage  # pyright: ignore[reportMissingImports]

    address = read_job(folder).config.trainer_common.ray_address
    write_stage(folder, Stage(f"joining Ray at {address}" if address else "starting Ray"))
    cluster = {"address": address} if address else own_cluster(os.environ["RAY_TMPDIR"])
    ray.init(
        **cluster,
        namespace=config.ray_namespace,
        runtime_env={"env_vars": process_environment(os.environ, shared=bool(address))},
    )
    config.check_and_update()
    write_stage(folder, Stage("starting Trinity's processes"))
    return bool(run_stage(config).success)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
