"""Weights from the trainer to rollout servers of their own pool: verl's checkpoint engine
"memory_file", for one machine.

The trainer's first rank writes all weights into a file in memory and says so in a second
one, which receivers watch; a sender that fails says that too. No wait is without a limit.
It moves no request: verl pauses and resumes the servers around it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from verl.checkpoint_engine.base import (  # pyright: ignore[reportMissingImports]
    CheckpointEngine,
    CheckpointEngineRegistry,
)

from astuner.backbone.verl_cpu import WEIGHT_SYNC
from astuner.backbone.verl_cpu.memory_file import MemoryFile, machine
from astuner.backbone.verl_cpu.waits import SYNC_SECONDS
from astuner.engine.embedded.received import read_weights, write_weights
from astuner.errors import ConfigError, DeadlineExceeded, EngineError

SECONDS_BETWEEN_LOOKS = 0.02


@CheckpointEngineRegistry.register(WEIGHT_SYNC)  # pyright: ignore[reportUntypedClassDecorator]
class MemoryFileSync(CheckpointEngine):  # pyright: ignore[reportUntypedBaseClass]
    """One instance in each rank of the trainer and in each receiver; `seconds` is the
    deadline of one sync (checkpoint_engine.engine_kwargs.memory_file.seconds)."""

    def __init__(
        self, bucket_size: int, is_master: bool = False, seconds: float = SYNC_SECONDS
    ) -> None:
        self._is_master = is_master
        self._seconds = seconds
        self._files: tuple[MemoryFile, MemoryFile] | None = None
        self._paths: tuple[Path, Path] | None = None

    def prepare(self) -> dict[str, Any]:
        """Only the trainer's first rank has files; all say on which machine they are."""
        self.finalize()
        if not self._is_master:
            return {"machine": machine()}
        self._files = MemoryFile("astuner-sync"), MemoryFile("astuner-sync-state")
        return {"machine": machine(), "paths": [str(file.path) for file in self._files]}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """All get the sender's paths. Raises ConfigError when they are on two machines."""
        sender = next(m for m in metadata if "paths" in m)
        others = {m["machine"] for m in metadata} - {sender["machine"]}
        if others:
            raise ConfigError(
                f"checkpoint_engine.backend={WEIGHT_SYNC} works on one machine, but the trainer "
                f"is on {sender['machine']} and rollouts on {', '.join(sorted(others))}. Runs "
                "without GPUs are for one machine; on several, use GPUs and the backend nccl."
            )
        paths = [sender["paths"]]
        return {"paths": paths * actor_wg_world_size}, {"paths": paths * rollout_world_size}

    def init_process_group(self, paths: list[str]) -> None:
        self._paths = Path(paths[0]), Path(paths[1])

    def finalize(self) -> None:
        for file in self._files or ():
            file.close()
        self._files = self._paths = None

    async def send_weights(
        self, weights: Iterable[tuple[str, Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Every rank goes through the weights, as gathering them is collective."""
        started = time.monotonic()
        if not self._is_master:
            for _ in weights:
                pass
            return {}
        place, state = self._agreed()
        try:
            size = write_weights(place, weights, global_steps or 0)
        except BaseException as error:
            state.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            raise
        state.write_text(json.dumps({"bytes": size}) + "\n")
        return {"sync/bytes": float(size), "sync/seconds": time.monotonic() - started}

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[str, Tensor]]:
        """Raises DeadlineExceeded, or EngineError when the sender has failed."""
        place, state = self._agreed()
        deadline = time.monotonic() + self._seconds
        while not (said := _read(state, global_steps)).endswith("\n"):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"Weight sync of step {global_steps}: the trainer did not send its weights "
                    f"within {self._seconds:.0f} s. See its log in the run's verl/verl.log; "
                    f"checkpoint_engine.engine_kwargs.{WEIGHT_SYNC}.seconds is the limit."
                )
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        if "error" in (outcome := json.loads(said)):
            raise EngineError(
                f"Weight sync of step {global_steps}: the trainer failed to send its weights: "
                f"{outcome['error']}"
            )
        tensors, _ = read_weights(place)
        for pair in tensors.items():
            yield pair

    def _agreed(self) -> tuple[Path, Path]:
        if self._paths is None:
            raise EngineError("Weight sync: init_process_group was not called before it.")
        return self._paths


def _read(state: Path, global_steps: int | None) -> str:
    try:
        return state.read_text()
    except FileNotFoundError as error:
        raise EngineError(
            f"Weight sync of step {global_steps}: the trainer's process is gone."
        ) from error
