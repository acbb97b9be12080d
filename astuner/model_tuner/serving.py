"""What the endpoints share: the engines, the codec, and how choices are sampled together.

All choices of a request are drawn in parallel and recorded in one go, after the
last of them is finished and before the client is told so: a call is recorded
only when its whole answer exists. A client that leaves, an engine that fails or
an episode that ends before that leaves no record.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from astuner.chat.protocol import ChatCodec
from astuner.engine.protocol import Engine
from astuner.errors import DeadlineExceeded
from astuner.model_tuner.reply import Growth, Reply
from astuner.model_tuner.session import SessionBook


@dataclass(frozen=True, slots=True)
class Serving:
    engine: Engine
    codec: ChatCodec
    model_name: str
    sessions: SessionBook
    call_timeout: float
    """Seconds the engine may take for one request."""
    engines: Mapping[str, Engine] = field(default_factory=dict[str, Engine])
    """Target tag -> who answers it, where that is not `engine`."""

    async def sample(self, replies: Sequence[Reply], on_growth: Growth | None = None) -> None:
        """Draw all of them. Raises EngineError, DeadlineExceeded; the others are then
        cancelled."""
        engine = self.engines.get(replies[0].turn.agent.target_tag, self.engine)
        async with model_deadline(self.call_timeout):
            if len(replies) == 1:
                await replies[0].sample(engine, on_growth)
            else:
                await self._together(engine, replies, on_growth)

    async def _together(
        self, engine: Engine, replies: Sequence[Reply], on_growth: Growth | None
    ) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for reply in replies:
                    group.create_task(reply.sample(engine, on_growth))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def envelope(self, kind: str, response_id: str) -> dict[str, Any]:
        """The outer fields of a response or chunk; `choices` is to follow."""
        return {
            "id": response_id,
            "object": kind,
            "created": int(time.time()),
            "model": self.model_name,
        }


@asynccontextmanager
async def model_deadline(seconds: float) -> AsyncGenerator[None]:
    """Raises DeadlineExceeded when what is inside takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"The model did not answer within {seconds:g} s. Raise rollout.call_timeout, or "
            "lower rollout.max_response_length_in_one_turn."
        ) from error
