"""One stream as the scheduler sees it: what was asked for, and how far it has come.

Plain data; whoever holds a request moves it on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from astuner.engine.embedded.mailbox import Mailbox
from astuner.engine.embedded.prefix_cache import Owner
from astuner.engine.protocol import SamplingParams
from astuner.types import FinishReason, TokenIds, token_ids


@dataclass(eq=False, slots=True)
class Request:
    prompt: TokenIds
    params: SamplingParams
    seed: int
    mailbox: Mailbox
    weights: str = ""
    """Which weights sample it; see `SamplingWeights.sampling`."""
    tenant: str = ""
    """Shares no KV with another tenant's requests."""
    drawn: list[int] = field(default_factory=list[int])
    cached: int | None = None
    """Prompt tokens found in the prefix cache at the first admission."""
    kv_version: int = -1
    """The weights at admission; KV is shared only while they are still in use."""

    @property
    def owner(self) -> Owner:
        return self.weights, self.tenant

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.drawn)

    @property
    def last_token(self) -> int:
        return self.drawn[-1] if self.drawn else int(self.prompt[-1])

    def fed(self) -> TokenIds:
        """All tokens but the last: those whose KV decoding needs."""
        return np.concatenate([self.prompt, token_ids(self.drawn)])[:-1]

    def finish_reason(self, max_context: int) -> FinishReason | None:
        if self.drawn[-1] in self.params.stop_token_ids:
            return "stop"
        full = len(self.drawn) >= self.params.max_tokens or self.length >= max_context
        return "length" if full else None


@dataclass(eq=False, slots=True)
class Prefill:
    """An admitted request whose KV is being computed, outside the pool."""

    request: Request
    tokens: TokenIds
    kv: Tensor
    done: int

    @property
    def missing(self) -> int:
        return len(self.tokens) - self.done
