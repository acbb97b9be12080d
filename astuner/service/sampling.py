"""Sample requests: from a future to pieces of work, and from their results to its answer.

Each sequence is a piece of work of its own in the fair queue; the last to finish answers
the future. One that fails, or a sampler that ends, fails the whole request; a client that
cancels ends the drawing at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field, replace

from astuner.errors import AstunerError, EngineClosed
from astuner.service.futures import FutureBook
from astuner.service.names import request_id
from astuner.service.observe import Observer
from astuner.service.protobuf import sample_answer
from astuner.service.records import FutureRecord, SamplerRecord
from astuner.service.samplers import Drawing, Drawn, Sampled, SampleSpec
from astuner.service.scheduler import Work, Workers
from astuner.service.snapshots import SnapshotShelf

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Request:
    """One request in the making."""

    record: FutureRecord
    sampler: SamplerRecord
    spec: SampleSpec
    drawn: dict[int, Drawn] = field(default_factory=dict[int, Drawn])
    scored: Sampled | None = None
    begun_at: float | None = None
    """Since when (monotonic) the engine has had a piece of it in hand."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set["asyncio.Task[None]"])

    @property
    def complete(self) -> bool:
        return self.scored is not None and len(self.drawn) == self.spec.num_samples


UNANSWERED = "The service's engine has not answered for too long. Tell who runs it."
SCORE = -1
"""The piece of work that is about the prompt."""


class SampleDesk:
    """Takes sample requests and answers them. Lives on the server's loop."""

    def __init__(
        self,
        futures: FutureBook,
        shelf: SnapshotShelf,
        drawing: Drawing,
        workers: Workers,
        observer: Observer,
    ) -> None:
        self._futures = futures
        self._shelf = shelf
        self._drawing = drawing
        self._workers = workers
        self._observer = observer
        self._requests: dict[str, _Request] = {}

    def take(self, sampler: SamplerRecord, seq: int, spec: SampleSpec, digest: str) -> FutureRecord:
        """Queue the request's pieces; a repeated request is queued once."""
        name = request_id(sampler.sampler_id, seq)
        record = FutureRecord(
            name,
            sampler.tenant,
            sampler.session_id,
            sampler.sampler_id,
            "sample",
            digest,
            time.time(),
        )
        if not self._futures.open(record):
            return record
        request = self._requests[name] = _Request(record, sampler, spec)
        wants_scores = spec.prompt_logprobs or spec.top_prompt
        if not wants_scores:
            request.scored = Sampled(())
        for piece in [*([SCORE] if wants_scores else []), *range(spec.num_samples)]:
            self._queue(request, piece)
        return record

    def cancel(self, record: FutureRecord) -> None:
        """Stop drawing for a request that nobody waits for."""
        request = self._requests.get(record.request_id)
        if request is not None:
            self._fail(request, "The request was cancelled by its client.")

    def give_up_unanswered(self, seconds: float, stuck: str) -> None:
        """Fail requests that the engine has had for longer than this; with `stuck` (what it is
        at) all that there are."""
        now = time.monotonic()
        for request in list(self._requests.values()):
            since = now - (request.begun_at or now)
            if stuck or since > seconds:
                logger.error(
                    "The engine does not answer: sample request %s (tenant %s), which it has had "
                    "for %.0f s. %s",
                    request.record.request_id,
                    request.sampler.tenant,
                    since,
                    stuck,
                )
                self._fail(request, UNANSWERED, server=True)

    @property
    def busy(self) -> set[str]:
        """Samplers that have something to draw."""
        return {request.sampler.sampler_id for request in self._requests.values()}

    def _queue(self, request: _Request, piece: int) -> None:
        async def run() -> None:
            await self._do(request, piece)

        def drop() -> None:
            self._fail(request, "The sampler ended before this was drawn.")

        sampler = request.sampler
        self._workers.submit(Work(sampler.tenant, sampler.sampler_id, run, drop))

    async def _do(self, request: _Request, piece: int) -> None:
        if request.record.request_id not in self._requests:
            return  # it has failed or been cancelled meanwhile
        task = asyncio.current_task()
        assert task is not None
        request.tasks.add(task)
        request.begun_at = request.begun_at or time.monotonic()
        try:
            with self._observer.operation("sample", request.sampler.tenant):
                await self._piece(request, piece)
        except AstunerError as error:
            self._fail(request, str(error), server=isinstance(error, EngineClosed))
        except Exception as error:  # the boundary to the engine
            logger.exception("request %s failed", request.record.request_id)
            self._fail(request, f"A bug in the service: {error!r}", server=True)
        finally:
            request.tasks.discard(task)

    async def _piece(self, request: _Request, piece: int) -> None:
        async with self._shelf.use(request.sampler.weights) as weights:
            if piece == SCORE:
                request.scored = await self._drawing.score(request.spec, weights)
            else:
                tenant = request.sampler.tenant
                drawn = await self._drawing.draw(request.spec, piece, weights, tenant)
                request.drawn[piece] = drawn
        if request.complete and self._requests.pop(request.record.request_id, None):
            self._answer(request)

    def _answer(self, request: _Request) -> None:
        assert request.scored is not None
        spec = request.spec
        sequences = [request.drawn[i] for i in range(spec.num_samples)]
        tokens = sum(len(s.token_ids) for s in sequences)
        self._observer.sampled(request.sampler.tenant, tokens, len(spec.prompt))
        answer = sample_answer(
            replace(request.scored, sequences=sequences),
            top_sampled=spec.params.top_logprobs,
            top_prompt=spec.top_prompt,
        )
        self._futures.done(request.record.request_id, answer)

    def _fail(self, request: _Request, message: str, *, server: bool = False) -> None:
        if self._requests.pop(request.record.request_id, None) is None:
            return
        category = "server" if server else "user"
        self._observer.failed("sample", request.sampler.tenant, category)
        self._futures.fail(request.record.request_id, message, category)
        for task in request.tasks - {asyncio.current_task()}:
            task.cancel()
