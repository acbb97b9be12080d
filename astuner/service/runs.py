"""Runs: whose they are, in what order their operations are done, and how they end.

Operations go through a run's log (order of seq_id), then through the fair queue (one at a
time over all runs: there is one device), then through `training`. A failed operation is
answered with its error and uses up its number. An adapter that a stopped server took with
it is made again when the run's next operation comes, if its last state was saved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from astuner.engine.protocol import AdapterHost
from astuner.errors import (
    AstunerError,
    CheckpointError,
    EngineClosed,
    EngineError,
    ModelError,
    RequestError,
)
from astuner.service.futures import FutureBook
from astuner.service.names import request_id
from astuner.service.observe import Observer
from astuner.service.oplog import OperationLog
from astuner.service.records import Category, FutureRecord, RunRecord, parse, row
from astuner.service.scheduler import Work, Workers
from astuner.service.store.protocol import Row, Store
from astuner.service.training import Done, Trainer

logger = logging.getLogger(__name__)

CREATE = 0
"""The seq_id of making the run; the client's own numbers start at 1."""


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


@dataclass(slots=True)
class _Run:
    record: RunRecord
    log: OperationLog[Operation]
    live: bool = False
    """Whether the engine has its adapter."""


class RunBook:
    """All runs of the server. Lives on the server's loop."""

    def __init__(
        self,
        store: Store,
        futures: FutureBook,
        host: AdapterHost,
        trainer: Trainer,
        workers: Workers,
        observer: Observer,
        *,
        max_waiting: int,
    ) -> None:
        self._store = store
        self._futures = futures
        self._host = host
        self._trainer = trainer
        self._workers = workers
        self._observer = observer
        self._max_waiting = max_waiting
        self._runs: dict[str, _Run] = {}

    # ------------------------------------------------------------ finding

    def known(self, run_id: str) -> bool:
        return run_id in self._runs

    def find(self, run_id: str, tenant: str) -> RunRecord:
        """Raises RequestError (404) for one that is not the tenant's."""
        run = self._runs.get(run_id)
        if run is None or run.record.tenant != tenant:
            raise RequestError(
                f"There is no training run {run_id[:100]!r}.", status=404, code="no_such_run"
            )
        return run.record

    def of_tenant(self, tenant: str) -> list[RunRecord]:
        """Newest first."""
        mine = [r.record for r in self._runs.values() if r.record.tenant == tenant]
        return sorted(mine, key=lambda r: r.created_at, reverse=True)

    def of_session(self, session_id: str) -> list[RunRecord]:
        return [r.record for r in self._runs.values() if r.record.session_id == session_id]

    def live(self, tenant: str) -> int:
        """Adapters that this tenant has in the engine, or will have in a moment."""
        mine = (r for r in self._runs.values() if r.record.tenant == tenant)
        return sum(r.live or r.log.next_seq == CREATE for r in mine)

    @property
    def waiting(self) -> int:
        """Operations that wait for their turn, or for one before them."""
        return sum(run.log.waiting for run in self._runs.values())

    # ------------------------------------------------------------ taking requests

    def create(self, record: RunRecord, operation: Operation, digest: str) -> str:
        """A new run, made by `operation`; returns the request's id. Raises RequestError (400)
        when its number belongs to another. A run that the store does not take is a failed
        request: the same one, sent again, has to find an answer."""
        if record.run_id in self._runs and not self._futures.known(operation.request_id):
            raise RequestError(
                f"The run {record.run_id} exists already.",
                code="number_reused",
                param="model_seq_id",
            )
        if self._open_future(record, operation, digest):
            try:
                self._store.write([row(record)])
            except CheckpointError as error:
                self._observer.failed(operation.kind, record.tenant, "server")
                self._futures.fail(operation.request_id, str(error), "server")
                return operation.request_id
            run = _Run(record, OperationLog(CREATE, self._max_waiting))
            self._runs[record.run_id] = run
            run.log.add(CREATE, operation, time.monotonic())
            self._advance(run)
        return operation.request_id

    def submit(self, record: RunRecord, seq: int, operation: Operation, digest: str) -> str:
        """An operation of a run; returns the request's id. Raises RequestError."""
        run = self._runs[record.run_id]
        if self._futures.known(operation.request_id):
            self._open_future(record, operation, digest)  # the same request, or an error
            return operation.request_id
        run.log.add(seq, operation, time.monotonic())
        self._open_future(record, operation, digest)
        self._advance(run)
        return operation.request_id

    def _open_future(self, record: RunRecord, operation: Operation, digest: str) -> bool:
        return self._futures.open(
            FutureRecord(
                operation.request_id,
                record.tenant,
                record.session_id,
                record.run_id,
                operation.kind,
                digest,
                time.time(),
            )
        )

    # ------------------------------------------------------------ doing

    def _advance(self, run: _Run) -> None:
        """Queue the run's next operation, if it is there."""
        operation = run.log.take(time.monotonic())
        if operation is None:
            return
        record = run.record
        self._workers.submit(
            Work(
                record.tenant,
                record.run_id,
                partial(self._do, run, operation),
                partial(self._dropped, run, operation),
            )
        )

    async def _do(self, run: _Run, operation: Operation) -> None:
        record = run.record
        with self._observer.operation(operation.kind, record.tenant):
            try:
                do = operation.do
                if not run.live and operation.revive is not None:
                    do = operation.revive
                elif not run.live and not self._is_creation(operation, run):
                    await self._trainer.bring_back(record)
                    run.live = True
                answer, record = await do(record)
                run.live = True
            except Exception as error:  # the boundary to the engine
                self._failed(run, operation, error)
                return
        self._observer.trained(record.tenant, operation.tokens)
        run.log.finish(time.monotonic())
        self._keep(run, record)
        self._futures.done(operation.request_id, answer, also=[row(run.record)])
        self._advance(run)

    def _is_creation(self, operation: Operation, run: _Run) -> bool:
        return operation.request_id == request_id(run.record.run_id, CREATE)

    def _failed(self, run: _Run, operation: Operation, error: Exception) -> None:
        category = _category(error)
        if not isinstance(error, AstunerError):
            logger.exception("operation %s failed", operation.request_id, exc_info=error)
        self._finish_failed(run, operation, _message(error), category)
        if self._is_creation(operation, run):
            self._bury(run, f"run {run.record.run_id} could not be created")
        else:
            self._advance(run)

    def _dropped(self, run: _Run, operation: Operation) -> None:
        reason = f"Run {run.record.run_id} ended before this was done."
        self._finish_failed(run, operation, reason, "user")

    def _finish_failed(
        self, run: _Run, operation: Operation, message: str, category: Category
    ) -> None:
        run.log.finish(time.monotonic())
        self._keep(run, run.record)
        self._observer.failed(operation.kind, run.record.tenant, category)
        self._futures.fail(operation.request_id, message, category, also=[row(run.record)])

    def _keep(self, run: _Run, record: RunRecord) -> None:
        run.record = replace(record, next_seq=run.log.next_seq, last_request_at=time.time())

    # ------------------------------------------------------------ ending

    async def end(self, run_id: str, reason: str) -> None:
        """Answer what waits with `reason`, and give the adapter back. Its record stays."""
        run = self._runs.get(run_id)
        if run is None:
            return
        self._workers.close_lane(run.record.tenant, run_id)
        self._bury(run, reason, forget=False)
        if run.live:
            run.live = False
            try:
                await self._host.release(run_id)
            except EngineError as error:
                logger.debug("release of %s: %s", run_id, error)

    def _bury(self, run: _Run, reason: str, *, forget: bool = True) -> None:
        for operation in run.log.clear():
            self._futures.fail(operation.request_id, f"Not done: {reason}.", "user")
        if forget:
            self._runs.pop(run.record.run_id, None)
            self._store.write([Row("runs", run.record.run_id, None)])

    def give_up_gaps(self, seconds: float) -> None:
        """Fail operations that wait for one that never came."""
        for run in self._runs.values():
            missing, waiting = run.log.overdue(time.monotonic(), seconds)
            for operation in waiting:
                self._futures.fail(
                    operation.request_id,
                    f"Request {missing} of this run did not arrive within {seconds:g} s, and this "
                    "one comes after it. Was that one refused?",
                    "user",
                )

    # ------------------------------------------------------------ after a restart

    def load(self) -> None:
        """Read what an earlier server left. Adapters are made when they are needed."""
        for _, value in self._store.scan("runs"):
            record = parse(RunRecord, value)
            known = [_seq(f) for f in self._futures.of(record.run_id)]
            next_seq = max([1, record.next_seq, *(seq + 1 for seq in known)])
            log = OperationLog[Operation](next_seq, self._max_waiting)
            self._runs[record.run_id] = _Run(replace(record, next_seq=next_seq), log)

    def forget(self, run_id: str) -> None:
        """A run whose creation was not finished."""
        self._runs.pop(run_id, None)
        self._store.write([Row("runs", run_id, None)])

    def way_back(self, run_id: str) -> str:
        """What its user can do now."""
        run = self._runs.get(run_id)
        if run is None:
            return "Create the run again."
        if not run.record.changed:
            return "The run is as it was before; send it again."
        if run.record.last_state:
            return f"The last saved state of the run is {run.record.last_state}."
        return "The run was never saved with save_state; begin again."


def _seq(record: FutureRecord) -> int:
    return int(record.request_id.rpartition(":")[2])


def _category(error: Exception) -> Category:
    """Whose fault it is; the SDK tells its user."""
    if isinstance(error, EngineClosed | CheckpointError):
        return "server"
    return "user" if isinstance(error, RequestError | EngineError | ModelError) else "server"


def _message(error: Exception) -> str:
    if isinstance(error, AstunerError):
        return str(error)
    return f"A bug in the service: {type(error).__name__}: {error}"
