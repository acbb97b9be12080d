"""All of the service but HTTP: the books of sessions, runs, checkpoints, samplers and
futures over one engine, and what happens as time passes.

What tenants ask is in `run_requests` and `sample_requests`, and here for sessions.
Everything lives on one event loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from astuner.chat.protocol import ChatCodec
from astuner.errors import CheckpointError
from astuner.service.base_model import BaseModel
from astuner.service.checkpoints import CheckpointBook
from astuner.service.chores import Chores
from astuner.service.futures import FutureBook
from astuner.service.limits import Limits
from astuner.service.names import new_session_id, request_id
from astuner.service.observe import Observer
from astuner.service.records import FutureRecord, SessionRecord
from astuner.service.run import CREATE
from astuner.service.run_requests import RunRequests
from astuner.service.runs import RunBook
from astuner.service.sample_requests import SampleRequests
from astuner.service.samplers import Drawing, SamplerBook
from astuner.service.sampling import SampleDesk
from astuner.service.scheduler import Workers
from astuner.service.sessions import SessionBook
from astuner.service.snapshots import SnapshotShelf
from astuner.service.store.protocol import Store
from astuner.service.training import Trainer

logger = logging.getLogger(__name__)

CHORE_SECONDS = 5.0
TRAINING_SLOTS = 4
"""Runs whose operations the engine has in hand; it takes turns between them itself."""


class Service:
    """One base model, shared."""

    def __init__(
        self,
        base: BaseModel,
        store: Store,
        data_dir: Path,
        *,
        codec: ChatCodec | None = None,
        limits: Limits | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Nothing runs before `start`."""
        self.base = base
        self.codec = codec
        self.limits = limits or Limits()
        self.observer = observer or Observer()
        self.store = store
        self.futures = FutureBook(store)
        self.sessions = SessionBook(store, self.limits)
        self.shelf = SnapshotShelf(
            base.host, data_dir / "spilled", max_resident=self.limits.max_snapshots
        )
        self.checkpoints = CheckpointBook(
            store,
            data_dir / "checkpoints",
            self.shelf,
            max_bytes=self.limits.max_checkpoint_bytes,
        )
        self.samplers = SamplerBook(
            store, self.checkpoints, self.shelf, kept=self.limits.max_run_samplers
        )
        self.training = Workers(slots=TRAINING_SLOTS)
        self.drawing = Workers(slots=self.limits.max_running_samples)
        self.trainer = Trainer(base, self.checkpoints, self.shelf, self.samplers)
        self.runs = RunBook(
            store,
            self.futures,
            base.host,
            self.trainer,
            self.training,
            self.observer,
            limits=self.limits,
        )
        self.desk = SampleDesk(
            self.futures, self.shelf, Drawing(base.host, codec), self.drawing, self.observer
        )
        self.run_requests = RunRequests(
            base,
            self.limits,
            self.sessions,
            self.futures,
            self.runs,
            self.checkpoints,
            self.samplers,
            self.desk,
            self.trainer,
        )
        self.sample_requests = SampleRequests(
            base,
            self.limits,
            self.sessions,
            self.futures,
            self.samplers,
            self.desk,
            self.drawing,
        )
        self.chores = Chores(
            {
                "watching the engine": self._watch,
                "ending silent sessions": self._end_silent_sessions,
                "giving up requests that never came": self._give_up_gaps,
                "forgetting old answers": self._forget_answers,
                "writing late records": self.futures.mend,
                "removing expired checkpoints": self.checkpoints.purge,
                "closing replaced samplers": self._close_samplers,
            },
            CHORE_SECONDS,
        )

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Take over what an earlier server left, and let time pass."""
        unanswered = self.futures.load()
        self.sessions.load()
        self.checkpoints.load()
        self.samplers.load()
        self.runs.load()
        for record in unanswered:
            self._give_up(record)
        self.chores.start()
        self._observe()

    async def close(self) -> None:
        """Stop. What is not answered is answered by the next server, with an error."""
        await self.chores.stop()
        await self.training.close()
        await self.drawing.close()
        try:
            await self.futures.mend()
        except CheckpointError as error:
            logger.error("%s Answers that were kept in memory are lost.", error)
        self.observer.close()
        self.store.close()

    def _give_up(self, record: FutureRecord) -> None:
        """Answer a request that a stopped server did not get to."""
        if self.samplers.known(record.owner):
            self.futures.lose(record.request_id)
            return
        if record.request_id == request_id(record.owner, CREATE):
            self.runs.forget(record.owner)
        self.futures.fail(
            record.request_id,
            "The server was stopped before this request was answered, and it had no effect. "
            + self.runs.way_back(record.owner),
            "server",
        )

    # ------------------------------------------------------------ as time passes

    async def _watch(self) -> None:
        """Requests that the engine does not answer are failed, and named in the log."""
        stuck = self.stuck()
        self.runs.give_up_unanswered(self.limits.operation_timeout, stuck)
        self.desk.give_up_unanswered(self.limits.operation_timeout, stuck)

    def stuck(self) -> str:
        """What the engine has been at for too long; empty while it moves."""
        stats = self.base.host.stats()
        if stats.doing in ("idle", "closed") or stats.beat_age <= self.limits.stuck_timeout:
            return ""
        return f"The engine has been at {stats.doing!r} for {stats.beat_age:.0f} s."

    async def _end_silent_sessions(self) -> None:
        for session in self.sessions.overdue():
            await self.end_session(
                session, f"no heartbeat came for {self.limits.session_timeout:g} s"
            )

    async def _give_up_gaps(self) -> None:
        self.runs.give_up_gaps(self.limits.gap_timeout)

    async def _forget_answers(self) -> None:
        self.futures.purge(time.time() - self.limits.result_ttl)

    async def _close_samplers(self) -> None:
        await self.samplers.close_surplus(self.desk.busy)

    def _observe(self) -> None:
        host, gauge = self.base.host, self.observer.gauge
        runs, samplers, drawing = self.runs, self.samplers, self.drawing
        gauge("astuner.queue.operations", "{operation}", lambda: by_tenant(runs.waiting()))
        gauge("astuner.queue.samples", "{sequence}", lambda: by_tenant(drawing.queue.lengths()))
        gauge("astuner.adapters", "{adapter}", lambda: by_tenant(runs.adapters()))
        gauge("astuner.samplers", "{sampler}", lambda: by_tenant(samplers.counts()))
        gauge("astuner.tokens_per_second", "1/s", lambda: by_tenant(self.observer.rates()))
        gauge("astuner.snapshots", "{snapshot}", lambda: [(host.stats().snapshots, {})])
        gauge("astuner.resident_bytes", "By", lambda: [(host.stats().resident_bytes, {})])
        gauge("astuner.snapshot_bytes", "By", lambda: [(host.stats().snapshot_bytes, {})])
        gauge("astuner.kv_bytes", "By", lambda: [(host.stats().kv_bytes, {})])
        gauge("astuner.prefix_cache_bytes", "By", lambda: [(host.stats().cache_bytes, {})])

    # ------------------------------------------------------------ sessions

    def create_session(self, tenant: str, fields: Mapping[str, Any]) -> SessionRecord:
        """Raises RequestError (400) beyond the tenant's quota."""
        record = SessionRecord(new_session_id(), tenant, time.time(), **fields)
        self.sessions.add(record)
        return record

    async def finish_session(self, tenant: str, session_id: str) -> None:
        """The client says that it is done."""
        await self.end_session(self.sessions.find(session_id, tenant), "its client finished it")

    async def end_session(self, session: SessionRecord, reason: str) -> None:
        """Give back its adapters and samplers. Records and checkpoints stay."""
        if session.ended:
            return
        self.sessions.end(session.session_id, reason)
        why = f"session {session.session_id} ended: {reason}"
        for run in self.runs.of_session(session.session_id):
            await self.runs.end(run.run_id, why)
        samplers = self.samplers.of_session(session.session_id)
        for sampler in samplers:
            self.drawing.close_lane(session.tenant, sampler.sampler_id)
        await self.samplers.close(samplers)
        self.samplers.forget_closed(session.session_id)


def by_tenant(values: Mapping[str, float]) -> list[tuple[float, dict[str, str]]]:
    return [(float(value), {"tenant": tenant}) for tenant, value in values.items()]
