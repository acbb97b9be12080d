"""What a tenant asks of training runs: making them, and their operations.

Every method is one request of an authenticated tenant; it checks, records and queues, and
never waits for the device. What a tenant does not own does not exist for it (404).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from astuner.engine.protocol import AdamParams
from astuner.errors import RequestError
from astuner.service.base_model import BaseModel
from astuner.service.checkpoints import CheckpointBook
from astuner.service.datums import TrainRequest
from astuner.service.futures import FutureBook
from astuner.service.limits import Limits
from astuner.service.names import parse_path, request_id, run_id, sampler_id
from astuner.service.records import RunRecord, SamplerRecord, Shape
from astuner.service.run import BACKWARD, CREATE, LOAD, STEP, Operation
from astuner.service.runs import RunBook
from astuner.service.samplers import SamplerBook
from astuner.service.sampling import SampleDesk
from astuner.service.sessions import SessionBook
from astuner.service.training import Done, Save, Trainer

BYTES_A_NUMBER = 20
"""Of an adapter in training: itself, fp32 masters and gradient, and two moments."""


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run that a client wishes for."""

    base_model: str
    shape: Shape
    seed: int | None = None
    """None draws one."""
    user_metadata: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RunRequests:
    base: BaseModel
    limits: Limits
    sessions: SessionBook
    futures: FutureBook
    runs: RunBook
    checkpoints: CheckpointBook
    samplers: SamplerBook
    desk: SampleDesk
    trainer: Trainer

    # ------------------------------------------------------------ making

    def create(self, tenant: str, session_id: str, number: int, wish: NewRun, digest: str) -> str:
        """A new run from scratch. Returns the request's id."""
        record = self._new_run(tenant, session_id, number, wish)
        operation = Operation(
            request_id(record.run_id, CREATE), "create_model", self.trainer.create
        )
        return self.runs.create(record, operation, digest)

    def create_from(
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
        operation = Operation(request_id(record.run_id, CREATE), LOAD, do)
        return self.runs.create(record, operation, digest)

    def _new_run(self, tenant: str, session_id: str, number: int, wish: NewRun) -> RunRecord:
        session = self.sessions.alive(session_id, tenant)
        name = run_id(session.session_id, number)
        if self.runs.known(name):
            return self.runs.find(name, tenant)
        self.base.check_name(wish.base_model)
        self._check_shape(wish.shape)
        self._check_quota(tenant, wish.shape)
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

    def _check_quota(self, tenant: str, shape: Shape) -> None:
        """By number, and by what they take in memory."""
        live, limits = self.runs.live(tenant), self.limits
        if len(live) >= limits.max_runs:
            raise RequestError(
                f"You have {limits.max_runs} training runs in memory, as many as this server "
                "allows. End a session that you no longer need.",
                code="quota_exceeded",
            )
        held, more = sum(self._nbytes(run.shape) for run in live), self._nbytes(shape)
        if limits.max_adapter_bytes and held + more > limits.max_adapter_bytes:
            raise RequestError(
                f"Your training runs take {held / 2**30:.2f} GiB of memory and this one would take "
                f"{more / 2**30:.2f}; this server allows each tenant "
                f"{limits.max_adapter_bytes / 2**30:.2f}. Take a smaller rank, or end a session "
                "that you no longer need.",
                code="quota_exceeded",
            )

    def _nbytes(self, shape: Shape) -> int:
        return BYTES_A_NUMBER * self.base.host.adapter_size(shape.lora(self.base.lora_alpha))

    # ------------------------------------------------------------ operations

    def forward_backward(self, tenant: str, request: TrainRequest, digest: str) -> str:
        do = partial(self.trainer.forward_backward, request=request)
        kind = "forward" if request.forward_only else BACKWARD
        tokens = 0 if request.forward_only else request.num_tokens
        ids = (tenant, request.run_id, request.seq)
        return self._operate(*ids, kind, do, digest, tokens=tokens, nbytes=request.nbytes)

    def optim_step(self, tenant: str, run: str, seq: int, params: AdamParams, digest: str) -> str:
        do = partial(self.trainer.optim_step, params=params)
        return self._operate(tenant, run, seq, STEP, do, digest)

    def save_state(self, tenant: str, run: str, seq: int, save: Save, digest: str) -> str:
        do = partial(self.trainer.save_state, save=save, seq=seq)
        return self._operate(tenant, run, seq, "save_weights", do, digest)

    def save_for_sampler(self, tenant: str, run: str, seq: int, save: Save, digest: str) -> str:
        do = partial(self.trainer.save_for_sampler, save=save, seq=seq)
        return self._operate(tenant, run, seq, "save_weights_for_sampler", do, digest)

    def open_sampler(
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
        return self._operate(tenant, run, seq, LOAD, do, digest, revive=revive)

    def _operate(
        self,
        tenant: str,
        run: str,
        seq: int,
        kind: str,
        do: Callable[[RunRecord], Awaitable[Done]],
        digest: str,
        **more: Any,
    ) -> str:
        record = self.runs.find(run, tenant)
        name = request_id(run, seq)
        if not self.futures.known(name):
            self.sessions.alive(record.session_id, tenant)
        return self.runs.submit(record, seq, Operation(name, kind, do, **more), digest)
