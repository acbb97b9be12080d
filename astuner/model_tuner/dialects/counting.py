"""How many tokens a request's prompt would have, without asking the model.

The prompt is built as for the call itself, so that the count is what the call would use:
where the request continues what was sampled before, those tokens are counted as sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from astuner.model_tuner.dialects.translation import Dialect
from astuner.model_tuner.exchange import Endpoint, Exchange
from astuner.model_tuner.session import AgentKey, SessionBook

Count = Callable[[AgentKey, dict[str, Any]], int]
"""Tokens of an agent's chat request."""


class TokenCount(Endpoint):
    """The dialect's endpoint for it."""

    def __init__(
        self, dialect: Dialect, count: Count, answer: dict[str, Any], sessions: SessionBook
    ) -> None:
        """`answer` is what stands around `input_tokens`."""
        super().__init__(sessions)
        self._dialect = dialect
        self._count = count
        self._answer = answer
        self.errors = dialect.errors

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        translation = self._dialect.translate(agent, await exchange.json())
        tokens = self._count(agent, translation.body)
        await exchange.reply({**self._answer, "input_tokens": tokens})
