"""Waits that end."""

from __future__ import annotations

import asyncio

import pytest

from astuner.backbone.verl_cpu.waits import answer
from astuner.errors import DeadlineExceeded, EngineError

pytestmark = pytest.mark.timeout(30)


async def test_an_answer_in_time() -> None:
    assert await answer(asyncio.sleep(0, 5), 10, "x") == 5


async def test_silence_ends_with_its_name() -> None:
    with pytest.raises(DeadlineExceeded, match="for the server to take the weights of step 3"):
        await answer(asyncio.Event().wait(), 0.05, "the server to take the weights of step 3")


async def test_a_failure_passes_through() -> None:
    async def fails() -> None:
        raise EngineError("broken")

    with pytest.raises(EngineError, match="broken"):
        await answer(fails(), 10, "x")
