"""The weight sync's two ends in one process, as verl calls them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl")

from astuner.backbone.verl_cpu.weight_sync import MemoryFileSync
from astuner.errors import ConfigError, DeadlineExceeded, EngineError

pytestmark = [pytest.mark.verl, pytest.mark.timeout(60)]
WEIGHTS = [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.ones(4, dtype=torch.bfloat16))]


class Pair:
    """Two ranks of a trainer and one receiver, introduced to each other as verl does."""

    def __init__(self, seconds: float = 20) -> None:
        self.senders = [MemoryFileSync(1, is_master=first) for first in (True, False)]
        self.receiver = MemoryFileSync(1, seconds=seconds)
        metadata = [engine.prepare() for engine in (*self.senders, self.receiver)]
        to_senders, to_receiver = MemoryFileSync.build_topology(2, 1, metadata)
        for engine, paths in zip(self.senders, to_senders["paths"], strict=True):
            engine.init_process_group(paths)
        self.receiver.init_process_group(to_receiver["paths"][0])
        self.file = Path(metadata[0]["paths"][0])

    async def receive(self) -> dict[str, Any]:
        return {name: t.clone() async for name, t in self.receiver.receive_weights(global_steps=7)}

    def finalize(self) -> None:
        for engine in (*self.senders, self.receiver):
            engine.finalize()


def failing() -> Iterator[tuple[str, torch.Tensor]]:
    yield WEIGHTS[0]
    raise MemoryError("no room for b")


async def test_all_weights_arrive_and_nothing_stays() -> None:
    pair = Pair()
    receiving = asyncio.create_task(pair.receive())
    await asyncio.sleep(0.05)
    assert not receiving.done()
    metrics = await pair.senders[0].send_weights(iter(WEIGHTS), global_steps=7)
    received = await receiving
    assert metrics["sync/bytes"] == 6 * 4 + 4 * 2
    assert list(received) == ["a", "b"]
    assert all(torch.equal(received[name], tensor) for name, tensor in WEIGHTS)
    assert pair.file.exists()
    pair.finalize()
    assert not pair.file.exists()


async def test_other_ranks_take_part_and_send_nothing() -> None:
    pair = Pair()
    weights = iter(WEIGHTS)
    assert await pair.senders[1].send_weights(weights, global_steps=7) == {}
    assert next(weights, None) is None  # gathering is collective: every rank must go through
    pair.finalize()


async def test_a_sender_that_fails_is_heard() -> None:
    pair = Pair()
    receiving = asyncio.create_task(pair.receive())
    with pytest.raises(MemoryError):
        await pair.senders[0].send_weights(failing(), global_steps=7)
    with pytest.raises(EngineError, match=r"step 7: the trainer failed .* no room for b"):
        await receiving
    pair.finalize()


async def test_a_sender_that_is_silent_or_gone_ends_the_wait() -> None:
    pair = Pair(seconds=0.1)
    with pytest.raises(DeadlineExceeded, match="Weight sync of step 7"):
        await pair.receive()
    pair.senders[0].finalize()
    with pytest.raises(EngineError, match="process is gone"):
        await pair.receive()


def test_two_machines_are_refused() -> None:
    sender, receiver = MemoryFileSync(1, is_master=True), MemoryFileSync(1)
    elsewhere = {**receiver.prepare(), "machine": "other:1"}
    with pytest.raises(ConfigError, match="rollouts on other:1"):
        MemoryFileSync.build_topology(1, 1, [sender.prepare(), elsewhere])
    sender.finalize()
