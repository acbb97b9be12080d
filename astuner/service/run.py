"""A run as the server has it in memory, and the operations that are asked of it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from astuner.service.oplog import OperationLog
from astuner.service.records import RunRecord
from astuner.service.training import Done

CREATE = 0
"""The seq_id of making the run; the client's own numbers start at 1."""
BACKWARD, STEP = "forward_backward", "optim_step"
"""Kinds of operations that a batch is made of."""
LOAD = "load_weights"


@dataclass(frozen=True, slots=True)
class Operation:
    """One request of a run."""

    request_id: str
    kind: str
    do: Callable[[RunRecord], Awaitable[Done]]
    revive: Callable[[RunRecord], Awaitable[Done]] | None = None
    """Done instead when the engine has no adapter: makes one, whatever became of the old."""
    tokens: int = 0
    """That it trains on, for the meters."""
    nbytes: int = 0
    """Of the data that it brings."""
    received_at: float = field(default_factory=time.monotonic)


@dataclass(slots=True, eq=False)
class Run:
    record: RunRecord
    log: OperationLog[Operation]
    live: bool = False
    """Whether the engine has its adapter."""
    ended: bool = False
    begun_at: float | None = None
    """Since when (monotonic) the engine has had the operation in hand."""
    spoilt: str = ""
    """The request whose failure took the gradient with it, until a step after it."""

    @property
    def is_new(self) -> bool:
        return self.log.next_seq == CREATE

    def finish(self, operation: Operation, record: RunRecord) -> None:
        """Its number is used up, and the run is as `record` says."""
        self.log.finish(operation, time.monotonic())
        self.record = replace(record, next_seq=self.log.next_seq, last_request_at=time.time())
