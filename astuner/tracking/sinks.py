"""Where the metrics of each step go: always `metrics.jsonl`, and what the config names.

`MetricSinks` fans out to the sinks of a registry; each tracker is reached through its
own package, imported only when named. A tracker that cannot start is an error before
the run; one that fails later is warned about once and left out. No metric is computed
here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from astuner.errors import ConfigError, MissingDependency
from astuner.tracking.metrics_file import MetricsFile

log = logging.getLogger(__name__)

SINKS: dict[str, str] = {
    "tensorboard": "astuner.tracking.trackers:TensorBoardSink",
    "wandb": "astuner.tracking.trackers:WandbSink",
    "swanlab": "astuner.tracking.trackers:SwanLabSink",
    "trackio": "astuner.tracking.trackers:TrackioSink",
    "mlflow": "astuner.tracking.trackers:MlflowSink",
}
"""What `trainer_common.logger` may name, besides "console" (see `display`): "module:attribute"."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a tracker is told about the run."""

    run_dir: Path
    project: str
    experiment: str
    config: Mapping[str, Any]
    resumed: bool = False


class Sink(Protocol):
    """One destination. It is built with a RunInfo, and raises MissingDependency if it has to."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class MetricSinks:
    """All sinks of a run. `log` and `close` never raise for a tracker's trouble."""

    def __init__(
        self,
        names: Sequence[str],
        run_dir: Path,
        project: str,
        experiment: str,
        config: Mapping[str, Any],
        *,
        resume_step: int | None = None,
    ) -> None:
        """`resume_step` is the last step of a resumed run that counts: what `metrics.jsonl`
        has beyond it is cut off. None starts a new file.

        Raises ConfigError for an unknown name or a tracker that cannot start,
        MissingDependency for one that is not installed.
        """
        makers = [_find(name) for name in names]
        info = RunInfo(run_dir, project, experiment, config, resume_step is not None)
        self._file = MetricsFile(run_dir / "metrics.jsonl", resume_step)
        self._sinks: dict[str, Sink] = {}
        for name, maker in zip(names, makers, strict=True):
            self._sinks[name] = self._started(name, maker, info)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step everywhere. Raises OSError only if metrics.jsonl cannot be written."""
        self._file.log(step, metrics)
        for name in list(self._sinks):
            self._guarded(name, "log", step, metrics)

    def close(self) -> None:
        """Flush and end every sink."""
        for name in list(self._sinks):
            self._guarded(name, "close")
        self._sinks.clear()
        self._file.close()

    def _started(self, name: str, maker: Callable[[RunInfo], Sink], info: RunInfo) -> Sink:
        try:
            return maker(info)
        except MissingDependency:
            self.close()
            raise
        except Exception as error:  # the boundary to trackers
            self.close()
            raise ConfigError(
                f"The logger {name!r} cannot start ({type(error).__name__}: {error}). Set it up, "
                "or take it out of trainer_common.logger."
            ) from error

    def _guarded(self, name: str, method: str, *args: object) -> None:
        """A tracker is part of the environment: its failure costs its own lines only."""
        try:
            getattr(self._sinks[name], method)(*args)
        except Exception as error:  # the boundary to trackers
            del self._sinks[name]
            log.warning(
                "The logger %r failed and is left out from now on (%s: %s). "
                "metrics.jsonl has everything.",
                name,
                type(error).__name__,
                error,
            )


def _find(name: str) -> Any:
    if name not in SINKS:
        raise ConfigError(
            f"trainer_common.logger names {name!r}, which is unknown. "
            f"Choose from: {', '.join(SINKS)}."
        )
    module, attribute = SINKS[name].split(":")
    return getattr(import_module(module), attribute)
