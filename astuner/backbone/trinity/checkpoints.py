"""Trinity's checkpoints of a run: which there are, and the tuned adapter of one.

On a service Trinity keeps, for each checkpoint, a folder with the service's path of it; its
weights lie in the data folder of the run's own service. Nothing here starts anything.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from astuner.backbone.report import MODEL, trinity_checkpoint
from astuner.backbone.trinity.sections import CHECKPOINTS, FOLDER
from astuner.backbone.trinity.service_child import DATA
from astuner.backbone.trinity.service_child import FOLDER as SERVICE
from astuner.errors import CheckpointError

SAMPLER = "latest_state_dict_iteration.txt"
REMOTE, REMOTE_SAMPLER = "remote_checkpoint_path.txt", "remote_sampler_path.txt"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def job_folder(run_dir: Path) -> Path:
    """Where Trinity keeps its state of the run."""
    return run_dir.joinpath(*CHECKPOINTS)


def newest(run_dir: Path) -> Path | None:
    """The folder of the newest checkpoint that is whole."""
    return trinity_checkpoint(run_dir)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("_")[2])


def remote_path(checkpoint: Path) -> str | None:
    """The service's path of it; None where Trinity trained without a service."""
    path = checkpoint / REMOTE
    return path.read_text().strip() if path.is_file() else None


def sampler_path(run_dir: Path, version: int | None = None) -> str | None:
    """The service's path of the sampler weights that Trinity's trainer has made: the newest, or
    of this version. None until it has; what an earlier attempt made does not count."""
    folder = job_folder(run_dir)
    try:
        newest = int((folder / SAMPLER).read_text())
        if version is not None and newest < version:
            return None
        step = newest if version is None else version
        return (folder / f"global_step_{step}" / REMOTE_SAMPLER).read_text().strip()
    except (OSError, ValueError):
        return None


def rewind(run_dir: Path, step: int, tasks_per_step: int) -> None:
    """Let Trinity's explorer go on where its trainer does.

    It saves where it is at each weight sync, which may be steps after the trainer's last
    checkpoint (explorer/explorer.py:440). The trainer forgets the sampler weights of those
    steps, which are another run's for the service (trainer/tinker/tinker_trainer.py:171).
    """
    folder = job_folder(run_dir)
    state = {
        "latest_iteration": step,
        "taskset_states": [{"current_index": step * tasks_per_step}],
    }
    (folder / "explorer_meta.json").write_text(json.dumps(state, indent=2))
    (folder / SAMPLER).unlink(missing_ok=True)


def service_folder(run_dir: Path, path: str) -> Path | None:
    """Where the run's own service keeps the files of tinker://RUN/KIND/NAME (its own rule:
    `service.names.CheckpointPath.folder`, each save in a folder of its own); None if nowhere."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    root = run_dir / FOLDER / SERVICE / DATA / "checkpoints" / run.replace(":", "_") / kind
    return max(root.glob(f"{name}@*"), key=lambda save: save.stat().st_mtime, default=None)


def export(run_dir: Path) -> Path | None:
    """Copy the newest checkpoint's adapter, in PEFT format, to the run's `model`; None when
    there is none. Raises CheckpointError when its weights are gone."""
    checkpoint = newest(run_dir)
    path = checkpoint and remote_path(checkpoint)
    if not path:
        return None
    source = service_folder(run_dir, path)
    missing = [name for name in ADAPTER if source is None or not (source / name).is_file()]
    if source is None or missing:
        raise CheckpointError(
            f"The checkpoint {path} of {checkpoint} has no {' and no '.join(missing)} among the "
            f"files of the run's service ({run_dir / FOLDER / SERVICE / DATA})."
        )
    fresh, target = run_dir / f".{MODEL}.tmp", run_dir / MODEL
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for name in ADAPTER:
        shutil.copy2(source / name, fresh / name)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return target
