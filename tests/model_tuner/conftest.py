"""The `make` fixture: worlds that are closed after the test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from astuner.chat.byte_codec import ByteCodec
from astuner.engine.fake import FakeEngine, Reply
from astuner.model_tuner.server import TunerServer

from .tuner_world import Make, World, reply


@pytest.fixture
def make() -> Iterator[Make]:
    """`make(*replies, **engine)`: a world whose engine answers so, texts as whole turns."""
    worlds: list[World] = []

    def build(*replies: str | Reply, call_timeout: float = 20.0, **engine: Any) -> World:
        script = [reply(r) if isinstance(r, str) else r for r in replies]
        fake = FakeEngine(script, **engine)
        world = World(fake, TunerServer(fake, ByteCodec(), call_timeout=call_timeout))
        worlds.append(world)
        return world

    yield build
    for world in worlds:
        world.server.close()
