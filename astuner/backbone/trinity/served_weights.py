"""Which of the weights on a run's service the explorer's calls are answered with.

Where rollouts run ahead, those that Trinity has brought to the explorer. Where they take
turns with the trainer, those after the step before, which each group waits for itself:
Trinity's explorer does so too, but not at the start, and in a resumed run it is one version
behind from then on. No Trinity in here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from astuner.backbone.trinity.checkpoints import sampler_path
from astuner.errors import EngineError

TRIES, SECONDS_BETWEEN = 20, 0.5
IN_TURNS: Mapping[str, Any] = {
    "synchronizer.sync_style": "fixed",
    "synchronizer.sync_interval": 1,
    "synchronizer.sync_offset": 0,
}
"""Trinity's settings with which a step is sampled with the weights of the step before."""


class ServedWeights(Protocol):
    """Tells the weights to sample with."""

    async def path(self) -> str:
        """The service's path of them, or the base model's name. Raises EngineError."""
        ...


class BroughtWeights:
    """Those that Trinity has brought to the explorer's model."""

    def __init__(self, model: Any, run_dir: Path, *, resumed: bool) -> None:
        """`model` is the Ray actor of Trinity's TinkerModel."""
        self._model = model
        self._run_dir = run_dir
        self._resumed = resumed

    async def path(self) -> str:
        """In a resumed run the model may still be at the base: at the start explorer and trainer
        sync at the same time, and the explorer does not wait (cli/launcher.py:258,
        manager/synchronizer.py:337). The trainer's weights are there then."""
        path: str = await self._model.get_model_path.remote()
        if "://" in path or not self._resumed:
            return path
        for _ in range(TRIES):
            if found := sampler_path(self._run_dir):
                return found
            await asyncio.sleep(SECONDS_BETWEEN)
        raise EngineError("Trinity's trainer has not brought the resumed weights to the service.")


class TurnsWeights:
    """Those of the step whose turn it is, as the trainer has left them."""

    def __init__(self, run_dir: Path, base: str, *, seconds: float) -> None:
        """`base` is the model that the first step is sampled with; the trainer may take `seconds`
        for a step (0: as long as it likes)."""
        self._run_dir = run_dir
        self._path = base
        self._seconds = seconds

    async def turn(self, step: int, ended: Callable[[], bool]) -> None:
        """Wait until the weights of a step, counted from 1, are there, or the run has ended.
        Raises EngineError if that takes too long."""
        if (version := step - 1) < 1:
            return
        try:
            async with asyncio.timeout(self._seconds or None):
                while (path := sampler_path(self._run_dir, version)) is None and not ended():
                    await asyncio.sleep(SECONDS_BETWEEN)
        except TimeoutError:
            raise EngineError(
                f"Trinity's trainer has not made the weights of step {version} within "
                f"{self._seconds:g} s (trainer_common.stall_timeout)."
            ) from None
        self._path = path or self._path

    async def path(self) -> str:
        return self._path
