"""Runs: whose they are, what is asked of them, and how they end.

Operations go through a run's log (order of seq_id), then through the fair queue (a few runs
at a time, which the engine lets take turns); doing them is `turns`' business. What a run
may have waiting is bounded, by number and by bytes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import replace

from astuner.engine.protocol import AdapterHost
from astuner.errors import CheckpointError, EngineError, RequestError
from astuner.service.futures import FutureBook
from astuner.service.limits import Limits
from astuner.service.observe import Observer
from astuner.service.oplog import OperationLog
from astuner.service.records import FutureRecord, RunRecord, parse, row
from astuner.service.run import CREATE, Operation, Run
from astuner.service.scheduler import Workers
from astuner.service.store.protocol import Row, Store
from astuner.service.training import Trainer
from astuner.service.turns import Turns

logger = logging.getLogger(__name__)

UNANSWERED = (
    "The service's engine has not answered for too long; whether this was done is not known. Tell "
    "who runs it."
)


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
        limits: Limits,
    ) -> None:
        self._store = store
        self._futures = futures
        self._host = host
        self._workers = workers
        self._observer = observer
        self._limits = limits
        self._turns = Turns(futures, trainer, workers, observer, self._not_made)
        self._runs: dict[str, Run] = {}

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

    def live(self, tenant: str) -> list[RunRecord]:
        """Whose adapters the engine has, or will have in a moment."""
        mine = (r for r in self._runs.values() if r.record.tenant == tenant and not r.ended)
        return [r.record for r in mine if r.live or r.is_new]

    def adapters(self) -> Counter[str]:
        """How many are live, by tenant."""
        return Counter(r.record.tenant for r in list(self._runs.values()) if r.live)

    def waiting(self) -> Counter[str]:
        """Operations that wait for their turn, or for one before them, by tenant."""
        counts = Counter[str]()
        for run in list(self._runs.values()):
            counts[run.record.tenant] += run.log.waiting
        return counts

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
            run = Run(record, OperationLog(CREATE, self._limits.max_waiting_operations))
            self._runs[record.run_id] = run
            run.log.add(CREATE, operation, time.monotonic())
            self._turns.advance(run)
        return operation.request_id

    def submit(self, record: RunRecord, seq: int, operation: Operation, digest: str) -> str:
        """An operation of a run; returns the request's id. Raises RequestError."""
        run = self._runs[record.run_id]
        if self._futures.known(operation.request_id):
            self._open_future(record, operation, digest)  # the same request, or an error
            return operation.request_id
        self._check_room(run, seq, operation)
        run.log.add(seq, operation, time.monotonic())
        self._open_future(record, operation, digest)
        self._turns.advance(run)
        return operation.request_id

    def _check_room(self, run: Run, seq: int, operation: Operation) -> None:
        """Raises RequestError (429) where the data that waits would be too much. The operation
        that others of the run wait for has a reserve, or nothing would ever move."""
        limits, is_next = self._limits, seq == run.log.next_seq
        mine = sum(o.nbytes for o in run.log.all) + operation.nbytes
        all_data = (o.nbytes for r in self._runs.values() for o in r.log.all)
        whole = sum(all_data) + operation.nbytes
        too_much = mine > limits.max_waiting_run_bytes and not is_next
        if too_much or whole > limits.max_waiting_bytes * (2 if is_next else 1):
            raise RequestError(
                "Much data waits to be trained on already, of this run or of all; try again later.",
                status=429,
                code="too_much_data",
            )

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

    # ------------------------------------------------------------ ending

    async def end(self, run_id: str, reason: str) -> None:
        """Answer what waits with `reason`, and give the adapter back. Its record stays."""
        run = self._runs.get(run_id)
        if run is None:
            return
        run.ended = True
        self._workers.close_lane(run.record.tenant, run_id)
        self._refuse_waiting(run, reason)
        run.live = False
        try:  # also where it is only being made: the engine keeps the order of its verbs
            await self._host.release(run_id)
        except EngineError as error:
            logger.debug("release of %s: %s", run_id, error)

    def _refuse_waiting(self, run: Run, reason: str) -> None:
        for operation in run.log.clear():
            self._futures.fail(operation.request_id, f"Not done: {reason}.", "user")

    def _not_made(self, run: Run) -> None:
        self._refuse_waiting(run, f"run {run.record.run_id} could not be created")
        self.forget(run.record.run_id)

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

    def give_up_unanswered(self, seconds: float, stuck: str) -> None:
        """Fail operations that the engine has had for longer than this, and what waits behind
        them; with `stuck` (what it is at) all that there is. Should it answer one day, the run
        goes on as it then is."""
        now = time.monotonic()
        late = [r for r in self._runs.values() if r.begun_at and now - r.begun_at > seconds]
        if stuck or len(late) >= self._workers.slots:
            late = list(self._runs.values())
        for run in late:
            for operation in run.log.all:
                if self._futures.fail(operation.request_id, UNANSWERED, "server"):
                    logger.error(
                        "The engine does not answer: %s of run %s (tenant %s), which came %.0f s "
                        "ago. %s",
                        operation.kind,
                        run.record.run_id,
                        run.record.tenant,
                        now - operation.received_at,
                        stuck,
                    )

    # ------------------------------------------------------------ after a restart

    def load(self) -> None:
        """Read what an earlier server left. Adapters are made when they are needed."""
        for _, value in self._store.scan("runs"):
            record = parse(RunRecord, value)
            known = [_seq(f) for f in self._futures.of(record.run_id)]
            next_seq = max([1, record.next_seq, *(seq + 1 for seq in known)])
            log = OperationLog[Operation](next_seq, self._limits.max_waiting_operations)
            self._runs[record.run_id] = Run(replace(record, next_seq=next_seq), log)

    def forget(self, run_id: str) -> None:
        """A run whose creation was not finished."""
        self._runs.pop(run_id, None)
        self._futures.write([Row("runs", run_id, None)])

    def way_back(self, run_id: str) -> str:
        """What its user can do now."""
        run = self._runs.get(run_id)
        if run is None:
            return "Create the run again."
        if not run.record.has_gone_on:
            return "The run is as it was before; send it again."
        if run.record.last_state:
            return f"The last saved state of the run is {run.record.last_state}."
        return "The run was never saved with save_state; begin again."


def _seq(record: FutureRecord) -> int:
    return int(record.request_id.rpartition(":")[2])
