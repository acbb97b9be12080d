"""All of the service but HTTP: the books of sessions, runs, checkpoints, samplers and
futures over one engine, and what happens as time passes.

Every method is one request of an authenticated tenant; it checks, records and queues, and
never waits for the device. Everything lives on one event loop. What a tenant does not own
does not exist for it (404).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from astuner.chat.protocol import ChatCodec
from astuner.engine.protocol import AdamParams
from astuner.errors import CheckpointError, RequestError
from astuner.service.checkpoints import CheckpointBook
from astuner.service.datums import TrainRequest
from astuner.service.futures import FutureBook
from astuner.service.limits import Limits
from astuner.service.names import new_session_id, parse_path, request_id, run_id, sampler_id
from astuner.service.observe import Observer
from astuner.service.records import (
    FutureRecord,
    RunRecord,
    SamplerRecord,
    SessionRecord,
    Shape,
)
from astuner.service.runs import CREATE, Operation, RunBook
from astuner.service.samplers import Drawing, SamplerBook, SampleSpec
from astuner.service.sampling import SampleDesk
from astuner.service.scheduler import Workers
from astuner.service.sessions import SessionBook
from astuner.service.snapshots import SnapshotShelf
from astuner.service.store.protocol import Store
from astuner.service.training import BaseModel, Done, Save, Trainer

logger = logging.getLogger(__name__)

REAP_SECONDS = 5.0
TRAINING_SLOTS = 4
"""Runs whose operations the engine has in hand; it takes turns between them itself."""


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run that a client wishes for."""

    base_model: str
    shape: Shape
    seed: int | None = None
    """None draws one."""
    user_metadata: dict[str, Any] | None = None


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
            max_waiting=self.limits.max_waiting_operations,
        )
        self.desk = SampleDesk(
            self.futures, self.shelf, Drawing(base.host, codec), self.drawing, self.observer
        )
        self._reaper: asyncio.Task[None] | None = None

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
        self._reaper = asyncio.create_task(self._pass_time())
        self._observe()

    async def close(self) -> None:
        """Stop. What is not answered is answered by the next server, with an error."""
        if self._reaper is not None:
            self._reaper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reaper
        await self.training.close()
        await self.drawing.close()
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

    async def _pass_time(self) -> None:
        while True:
            await asyncio.sleep(REAP_SECONDS)
            try:
                await self.reap()
            except CheckpointError as error:
                logger.error("%s", error)

    async def reap(self) -> None:
        """End sessions that nobody keeps alive; give up gaps; drop what is too old."""
        for session in self.sessions.overdue():
            await self.end_session(
                session, f"no heartbeat came for {self.limits.session_timeout:g} s"
            )
        self.runs.give_up_gaps(self.limits.gap_timeout)
        self.futures.purge(time.time() - self.limits.result_ttl)
        await self.checkpoints.purge()
        await self.samplers.close_surplus(self.desk.busy)

    def _observe(self) -> None:
        host, gauge = self.base.host, self.observer.gauge
        gauge("astuner.queue.operations", "{operation}", lambda: [(self.runs.waiting, {})])
        gauge("astuner.queue.samples", "{sequence}", lambda: self.drawing.queue.lengths())
        gauge("astuner.adapters", "{adapter}", lambda: [(host.stats().adapters, {})])
        gauge("astuner.snapshots", "{snapshot}", lambda: [(host.stats().snapshots, {})])
        gauge("astuner.resident_bytes", "By", lambda: [(host.stats().resident_bytes, {})])
        gauge("astuner.tokens_per_second", "1/s", lambda: [(host.stats().tokens_per_second, {})])

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

    # ------------------------------------------------------------ runs

    def create_run(
        self, tenant: str, session_id: str, number: int, wish: NewRun, digest: str
    ) -> str:
        """A new run from scratch. Returns the request's id."""
        record = self._new_run(tenant, session_id, number, wish)
        operation = Operation(
            request_id(record.run_id, CREATE), "create_model", self.trainer.create
        )
        return self.runs.create(record, operation, digest)

    def create_run_from(
        self,
        tenant: str,
        session_id: str,
        number: int,
        user_metadata: dict[str, Any] | None,
        path: str,
        optimizer: bool,
        digest: str,
    ) -> str:
        """A new run from a checkpoint, of its shape. Returns the request's id."""
        source = self.checkpoints.find(parse_path(path), tenant, reading=True)
        wish = NewRun(source.base_model, source.shape, user_metadata=user_metadata)
        record = self._new_run(tenant, session_id, number, wish)
        do = partial(self.trainer.create_from, path=path, optimizer=optimizer)
        operation = Operation(request_id(record.run_id, CREATE), "load_weights", do)
        return self.runs.create(record, operation, digest)

    def _new_run(self, tenant: str, session_id: str, number: int, wish: NewRun) -> RunRecord:
        session = self.sessions.alive(session_id, tenant)
        name = run_id(session.session_id, number)
        if self.runs.known(name):
            return self.runs.find(name, tenant)
        self.check_base(wish.base_model)
        self._check_shape(wish.shape)
        if self.runs.live(tenant) >= self.limits.max_runs:
            raise RequestError(
                f"You have {self.limits.max_runs} training runs in memory, as many as this server "
                "allows. End a session that you no longer need.",
                code="quota_exceeded",
            )
        now = time.time()
        return RunRecord(
            run_id=name,
            session_id=session_id,
            tenant=tenant,
            base_model=wish.base_model,
            shape=wish.shape,
            seed=secrets.randbits(31) if wish.seed is None else wish.seed,
            created_at=now,
            last_request_at=now,
            user_metadata=wish.user_metadata,
            next_seq=CREATE,
        )

    def check_base(self, name: str) -> None:
        """Raises RequestError (400) for a model that is not served."""
        if name != self.base.name:
            raise RequestError(
                f"The model {name!r} is not served here; {self.base.name!r} is.",
                code="unknown_model",
                param="base_model",
            )

    def _check_shape(self, shape: Shape) -> None:
        if not 1 <= shape.rank <= self.limits.max_rank:
            raise RequestError(
                f"The LoRA rank must be from 1 to {self.limits.max_rank}; it is {shape.rank}.",
                code="invalid_rank",
                param="rank",
            )
        if not (shape.train_attn or shape.train_mlp or shape.train_unembed):
            raise RequestError(
                "At least one of train_mlp, train_attn and train_unembed must be true.",
                code="nothing_to_train",
            )

    # ------------------------------------------------------------ operations of a run

    def forward_backward(self, tenant: str, request: TrainRequest) -> str:
        kind = "forward" if request.forward_only else "forward_backward"
        do = partial(self.trainer.forward_backward, request=request)
        tokens = 0 if request.forward_only else request.num_tokens
        return self._operate(
            tenant, request.run_id, request.seq, kind, do, request.digest(), tokens=tokens
        )

    def optim_step(self, tenant: str, run: str, seq: int, params: AdamParams, digest: str) -> str:
        do = partial(self.trainer.optim_step, params=params)
        return self._operate(tenant, run, seq, "optim_step", do, digest)

    def save_state(self, tenant: str, run: str, seq: int, save: Save, digest: str) -> str:
        do = partial(self.trainer.save_state, save=save, seq=seq)
        return self._operate(tenant, run, seq, "save_weights", do, digest)

    def save_for_sampler(self, tenant: str, run: str, seq: int, save: Save, digest: str) -> str:
        do = partial(self.trainer.save_for_sampler, save=save, seq=seq)
        return self._operate(tenant, run, seq, "save_weights_for_sampler", do, digest)

    def open_run_sampler(
        self, tenant: str, run: str, seq: int, number: int, inflight: bool, digest: str
    ) -> str:
        """A sampler of the run as it is when its turn comes."""
        record = self.runs.find(run, tenant)
        name = sampler_id(record.session_id, number)
        sampler = SamplerRecord(
            name,
            record.session_id,
            tenant,
            record.base_model,
            time.time(),
            weights=f"{run}:inflight" if inflight else name,
            run_id=run,
        )

        async def open_it(run: RunRecord) -> Done:
            done = await self.trainer.open_sampler(run, sampler)
            await self.samplers.close_surplus(self.desk.busy)
            return done

        return self._operate(tenant, run, seq, "save_weights_for_sampler", open_it, digest)

    def load_state(
        self, tenant: str, run: str, seq: int, path: str, optimizer: bool, digest: str
    ) -> str:
        do = partial(self.trainer.load, path=path, optimizer=optimizer)
        revive = partial(self.trainer.create_from, path=path, optimizer=optimizer)
        return self._operate(tenant, run, seq, "load_weights", do, digest, revive=revive)

    def _operate(
        self, tenant: str, run: str, seq: int, kind: str, do: Any, digest: str, **more: Any
    ) -> str:
        record = self.runs.find(run, tenant)
        name = request_id(run, seq)
        if not self.futures.known(name):
            self.sessions.alive(record.session_id, tenant)
        return self.runs.submit(record, seq, Operation(name, kind, do, **more), digest)

    # ------------------------------------------------------------ sampling

    def open_sampler(
        self,
        tenant: str,
        session_id: str,
        number: int,
        base_model: str | None,
        model_path: str | None,
    ) -> SamplerRecord:
        """Of the base model, or of a checkpoint. The same number gives the same sampler."""
        session = self.sessions.alive(session_id, tenant)
        name = sampler_id(session.session_id, number)
        if self.samplers.known(name):
            return self.samplers.find(name, tenant)
        if base_model is None and model_path is None:
            raise RequestError("Give base_model or model_path.", code="missing_model")
        self.check_base(base_model or self.base.name)
        record = SamplerRecord(
            name, session_id, tenant, base_model or self.base.name, time.time(), model_path
        )
        self.samplers.open(record)
        return record

    def sample(
        self, tenant: str, sampler: str, seq: int, spec: SampleSpec, digest: str
    ) -> FutureRecord:
        """Queue a sample request. Raises RequestError: 429 when too much waits already."""
        record = self.samplers.used(sampler, tenant)
        self.sessions.alive(record.session_id, tenant)
        if not self.futures.known(request_id(sampler, seq)):
            self.check_waiting(tenant, spec.num_samples)
        return self.desk.take(record, seq, spec, digest)

    def check_waiting(self, tenant: str, more: int) -> None:
        """Raises RequestError (429) when so many more sequences would be too many."""
        waiting = self.drawing.queue.length(tenant)
        if waiting and waiting + more > self.limits.max_waiting_samples:
            raise RequestError(
                f"{waiting} of your sequences wait to be drawn already; try again later.",
                status=429,
                code="too_many_samples",
            )

    def cancel(self, tenant: str, request: str) -> None:
        """Nobody waits for this sample request any more."""
        record = self.futures.find(request, tenant)
        if record.status == "pending" and self.samplers.known(record.owner):
            self.desk.cancel(record)
