"""Which of a service's weights a call is answered with."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from astuner.backbone.trinity import served_weights
from astuner.backbone.trinity.checkpoints import SAMPLER, job_folder
from astuner.backbone.trinity.processes import synchronizer
from astuner.backbone.trinity.served_weights import IN_TURNS, BroughtWeights, TurnsWeights
from astuner.config.schema import AstunerConfig
from astuner.errors import EngineError

BASE = "/models/tiny"


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_weights, "SECONDS_BETWEEN", 0.001)


def made(run: Path, version: int) -> str:
    """As Trinity's trainer leaves it (tinker_trainer.py:395)."""
    folder = job_folder(run) / f"global_step_{version}"
    folder.mkdir(parents=True, exist_ok=True)
    path = f"tinker://r/sampler_weights/checkpoints-trinity-sampler-{version}"
    (folder / "remote_sampler_path.txt").write_text(path)
    (job_folder(run) / SAMPLER).write_text(str(version))
    return path


def model(path: str) -> Any:
    async def remote() -> str:
        return path

    return SimpleNamespace(get_model_path=SimpleNamespace(remote=remote))


async def test_a_resumed_run_does_not_begin_with_the_base(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="has not brought the resumed weights"):
        await BroughtWeights(model(BASE), tmp_path, resumed=True).path()
    newest = made(tmp_path, 14)
    assert await BroughtWeights(model(BASE), tmp_path, resumed=True).path() == newest
    assert await BroughtWeights(model(BASE), tmp_path, resumed=False).path() == BASE
    brought = "tinker://r/sampler_weights/checkpoints-trinity-sampler-13"
    assert await BroughtWeights(model(brought), tmp_path, resumed=True).path() == brought


async def test_in_turns_a_step_waits_for_the_weights_of_the_step_before(tmp_path: Path) -> None:
    """The explorer of a resumed run would go on with the weights that it has."""
    weights = TurnsWeights(tmp_path, BASE, seconds=20)
    await weights.turn(1, lambda: False)
    assert await weights.path() == BASE
    first = made(tmp_path, 1)
    waiting = asyncio.create_task(weights.turn(3, lambda: False))
    await asyncio.sleep(0.05)
    assert not waiting.done() and await weights.path() == BASE
    second = made(tmp_path, 2)
    await asyncio.wait_for(waiting, 20)
    assert await weights.path() == second
    made(tmp_path, 3)
    await weights.turn(2, lambda: False)  # a validation of step 2, while the trainer is at work
    assert await weights.path() == first


async def test_a_trainer_that_makes_none_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    weights = TurnsWeights(tmp_path, BASE, seconds=0.05)
    with pytest.raises(EngineError, match=r"the weights of step 4 within 0.05 s"):
        await asyncio.wait_for(weights.turn(5, lambda: False), 20)
    endless = TurnsWeights(tmp_path, BASE, seconds=0)
    await asyncio.wait_for(endless.turn(5, lambda: True), 20)  # the run has ended
    assert await endless.path() == BASE


@pytest.mark.parametrize(("mode", "in_turns"), [("sync", True), ("async", False), ("auto", False)])
def test_only_a_synchronous_run_takes_turns(mode: str, in_turns: bool) -> None:
    config = AstunerConfig()
    config.rollout.mode = mode  # type: ignore[assignment]
    told = synchronizer(config, "service")
    assert all(told[key] == value for key, value in IN_TURNS.items()) is in_turns
