"""Doing the operations of runs, in their order: from a run's log to its answers.

A run has one operation at a time in the fair queue, so that its operations keep their
order. A failed one is answered with its error and uses up its number. After a failed
gradient what was sent along with it fails too, so that no step is taken on a part of a
batch. An adapter that a stopped server took with it is made again here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from astuner.errors import (
    AstunerError,
    CheckpointError,
    EngineClosed,
    EngineError,
    ModelError,
    RequestError,
)
from astuner.service.futures import FutureBook
from astuner.service.observe import Observer
from astuner.service.records import Category, row
from astuner.service.run import BACKWARD, LOAD, STEP, Operation, Run
from astuner.service.scheduler import Work, Workers
from astuner.service.training import Done, Trainer

logger = logging.getLogger(__name__)


class Turns:
    """Lives on the server's loop."""

    def __init__(
        self,
        futures: FutureBook,
        trainer: Trainer,
        workers: Workers,
        observer: Observer,
        not_made: Callable[[Run], None],
    ) -> None:
        """`not_made` is told of a run that could not be created."""
        self._futures = futures
        self._trainer = trainer
        self._workers = workers
        self._observer = observer
        self._not_made = not_made

    def advance(self, run: Run) -> None:
        """Queue the run's next operation, if it is there."""
        operation = None if run.ended else run.log.take(time.monotonic())
        if operation is None:
            return
        self._workers.submit(
            Work(
                run.record.tenant,
                run.record.run_id,
                partial(self._do, run, operation),
                partial(self._dropped, run, operation),
            )
        )

    async def _do(self, run: Run, operation: Operation) -> None:
        if not self._futures.is_pending(operation.request_id):  # given up meanwhile
            run.finish(operation, run.record)
            self.advance(run)
            return
        record, run.begun_at = run.record, time.monotonic()
        with self._observer.operation(operation.kind, record.tenant):
            try:
                self._check_batch(run, operation)
                answer, record = await self._done(run, operation)
                run.live = True
            except Exception as error:  # the boundary to the engine
                await self._failed(run, operation, error)
                return
            finally:
                run.begun_at = None
        if operation.kind == LOAD:  # which leaves no gradient either
            run.spoilt = ""
        self._observer.trained(record.tenant, operation.tokens)
        run.finish(operation, record)
        self._futures.done(operation.request_id, answer, also=[row(run.record)])
        self.advance(run)

    async def _done(self, run: Run, operation: Operation) -> Done:
        """What it came to, with the run's adapter made first where the engine lacks it."""
        if not run.live and operation.revive is not None:
            return await operation.revive(run.record)
        if not run.live and not run.is_new:
            await self._trainer.bring_back(run.record)
            run.live = True
        return await operation.do(run.record)

    def _check_batch(self, run: Run, operation: Operation) -> None:
        """Raises RequestError for the rest of a batch of which a part has failed: what was sent
        before its user could know of it, up to the step."""
        if not run.spoilt or operation.kind not in (BACKWARD, STEP):
            return
        spoilt = run.spoilt
        sent_along = operation.received_at < self._futures.told_at(spoilt)
        if operation.kind == STEP or not sent_along:
            run.spoilt = ""
        if sent_along:
            raise RequestError(
                f"Not done: request {spoilt} before it failed, and the gradient since the last "
                "step was dropped. Send the whole batch again.",
                code="batch_failed",
            )

    # ------------------------------------------------------------ failing

    async def _failed(self, run: Run, operation: Operation, error: Exception) -> None:
        if not isinstance(error, AstunerError):
            logger.exception("operation %s failed", operation.request_id, exc_info=error)
        if run.live and operation.kind in (BACKWARD, STEP):
            if operation.kind == BACKWARD and not run.spoilt:
                run.spoilt = operation.request_id
            run.record = await self._trainer.drop_gradient(run.record)
        is_new = run.is_new
        self._answer(run, operation, _message(error), _category(error))
        if is_new:
            self._not_made(run)
        else:
            self.advance(run)

    def _dropped(self, run: Run, operation: Operation) -> None:
        """The run ended; or a bug of ours, which the log has, came between it and its answer."""
        if run.ended:
            reason = f"Run {run.record.run_id} ended before this was done."
            self._answer(run, operation, reason, "user")
            return
        self._answer(run, operation, "A bug in the service: see its log.", "server")
        self.advance(run)

    def _answer(self, run: Run, operation: Operation, message: str, category: Category) -> None:
        run.finish(operation, run.record)
        self._observer.failed(operation.kind, run.record.tenant, category)
        self._futures.fail(operation.request_id, message, category, also=[row(run.record)])


def _category(error: Exception) -> Category:
    """Whose fault it is; the SDK tells its user."""
    if isinstance(error, EngineClosed | CheckpointError):
        return "server"
    return "user" if isinstance(error, RequestError | EngineError | ModelError) else "server"


def _message(error: Exception) -> str:
    if isinstance(error, AstunerError):
        return str(error)
    return f"A bug in the service: {type(error).__name__}: {error}"
