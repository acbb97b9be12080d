"""What a tenant asks of samplers: making them, and drawing from them.

Every method is one request of an authenticated tenant; it checks, records and queues, and
never waits for the device. What a tenant does not own does not exist for it (404).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from astuner.errors import RequestError
from astuner.service.base_model import BaseModel
from astuner.service.futures import FutureBook
from astuner.service.limits import Limits
from astuner.service.names import request_id, sampler_id
from astuner.service.records import FutureRecord, SamplerRecord
from astuner.service.samplers import SamplerBook, SampleSpec
from astuner.service.sampling import SampleDesk
from astuner.service.scheduler import Workers
from astuner.service.sessions import SessionBook


@dataclass(frozen=True, slots=True)
class SampleRequests:
    base: BaseModel
    limits: Limits
    sessions: SessionBook
    futures: FutureBook
    samplers: SamplerBook
    desk: SampleDesk
    drawing: Workers

    def open(
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
        self.base.check_name(base_model or self.base.name)
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
