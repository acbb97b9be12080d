"""A proxy over FakeEngine and ByteCodec, in process or on a real loopback port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from astuner.chat.byte_codec import ids
from astuner.engine.fake import FakeEngine
from astuner.model_tuner.server import TunerServer
from astuner.model_tuner.session import Session, SessionSampling, SessionSpec
from astuner.model_tuner.tuner import ModelTuner

USER = [{"role": "user", "content": "hi"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}},
    }
]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
PROMPT = ids("⟦user\nhi⟧\n⟦assistant\n")


@dataclass
class World:
    """One engine, its server and any number of sessions."""

    engine: FakeEngine
    server: TunerServer
    sessions: list[Session] = field(default_factory=list)

    def session(self, episode_id: str = "e1", **spec: Any) -> Session:
        session = self.server.open_session(SessionSpec(episode_id, **spec))
        self.sessions.append(session)
        return session

    @property
    def tuner(self) -> ModelTuner:
        return (self.sessions[-1] if self.sessions else self.session()).tuner

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that another thread brings about."""
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            await asyncio.sleep(0.005)


Make = Callable[..., World]


def reply(text: str) -> list[int]:
    """A reply that ends its turn."""
    return ids(f"{text}⟧")


def sampling(**fields: Any) -> SessionSampling:
    return SessionSampling(**{"max_tokens": 64, **fields})
