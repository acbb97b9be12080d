"""Experiment trackers, each through its own package: one small class each.

Offline modes are the packages' own (WANDB_MODE=offline, SWANLAB_MODE=offline, a trackio
or mlflow store on disk). A resumed run goes on in the tracker's same run where the
tracker can. Packages are imported on construction; a missing one names its extra.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from astuner.errors import MissingDependency

if TYPE_CHECKING:
    from astuner.tracking.sinks import RunInfo


def _package(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            error.name or module, extra, f"trainer_common.logger: [{extra}]"
        ) from error


def _run_id(info: RunInfo, tracker: str) -> str:
    """The tracker's id of this run: a new one, or after a resume the one it had."""
    path: Path = info.run_dir / "trackers" / tracker
    if info.resumed and path.exists():
        return path.read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    run_id = uuid4().hex[:12]
    path.write_text(run_id)
    return run_id


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


class TensorBoardSink:
    """Event files under run_dir/tensorboard: `tensorboard --logdir RUN_DIR`."""

    def __init__(self, info: RunInfo) -> None:
        _package("tensorboard", "tensorboard")
        module: Any = import_module("torch.utils.tensorboard")
        self._writer: Any = module.SummaryWriter(str(info.run_dir / "tensorboard"))
        config = "\n".join(f"    {k}: {v}" for k, v in _flat(info.config).items())
        self._writer.add_text("config", config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases; WANDB_MODE=offline writes under run_dir/wandb only."""

    def __init__(self, info: RunInfo) -> None:
        wandb = _package("wandb", "wandb")
        self._run: Any = wandb.init(
            project=info.project,
            name=info.experiment,
            id=_run_id(info, "wandb"),
            resume="allow",
            dir=str(info.run_dir),
            config=dict(info.config),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class SwanLabSink:
    """SwanLab; SWANLAB_MODE=offline writes under run_dir/swanlab only."""

    def __init__(self, info: RunInfo) -> None:
        swanlab = _package("swanlab", "swanlab")
        self._run: Any = swanlab.init(
            project=info.project,
            name=info.experiment,
            id=_run_id(info, "swanlab"),
            resume="allow",
            log_dir=str(info.run_dir / "swanlab"),
            config=dict(info.config),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioSink:
    """Trackio: a local store, shown by `trackio show`; its place is TRACKIO_DIR."""

    def __init__(self, info: RunInfo) -> None:
        self._trackio: Any = _package("trackio", "trackio")
        self._trackio.init(
            project=info.project,
            name=f"{info.experiment}-{_run_id(info, 'trackio')}",
            config=_flat(info.config),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


class MlflowSink:
    """MLflow; without MLFLOW_TRACKING_URI into run_dir/mlruns."""

    def __init__(self, info: RunInfo) -> None:
        mlflow = _package("mlflow", "mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:  # plain files need no database package, but MLflow wants to be asked
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (info.run_dir / "mlruns").absolute().as_uri()
        self._client: Any = mlflow.tracking.MlflowClient(uri)
        found = self._client.get_experiment_by_name(info.project)
        experiment = found.experiment_id if found else self._client.create_experiment(info.project)
        known = info.run_dir / "trackers" / "mlflow"
        if info.resumed and known.exists():
            self._id = known.read_text()
            return
        self._id = self._client.create_run(experiment, run_name=info.experiment).info.run_id
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(self._id)
        for key, value in _flat(info.config).items():
            self._client.log_param(self._id, key, value)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)
