"""Samplers ("sampling sessions"): which weights they stand for, and how they are drawn from.

A sampler is of the base model, of a checkpoint, or of weights kept only for it. Of a run's
weights that no checkpoint has, those used last are kept; the samplers of older ones are
closed. A sample request becomes one piece of work for each sequence, so that large requests
queue fairly with small ones; the engine batches whatever runs at once. No queue and no
futures here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from astuner.chat.protocol import ChatCodec
from astuner.engine.protocol import AdapterHost, SamplingParams, Scores
from astuner.errors import CheckpointError, RequestError
from astuner.model_tuner.stops import StopStrings
from astuner.service.checkpoints import CheckpointBook
from astuner.service.names import parse_path
from astuner.service.records import SamplerRecord, parse, row
from astuner.service.snapshots import SnapshotShelf
from astuner.service.store.protocol import Row, Store
from astuner.types import TokenIds

logger = logging.getLogger(__name__)


class SamplerBook:
    """All samplers of the server."""

    def __init__(
        self, store: Store, checkpoints: CheckpointBook, shelf: SnapshotShelf, *, kept: int
    ) -> None:
        """`kept`: sets of weights without a checkpoint that each run may have."""
        self._store = store
        self._checkpoints = checkpoints
        self._shelf = shelf
        self._kept = kept
        self._records: dict[str, SamplerRecord] = {}
        """Least recently used first."""
        self._closed: dict[str, str] = {}
        """Closed because their run has newer ones -> tenant."""

    def load(self) -> None:
        """Read what an earlier server left."""
        for _, value in self._store.scan("samplers"):
            record = parse(SamplerRecord, value)
            self._records[record.sampler_id] = record
            self._hold(record)

    def known(self, sampler_id: str) -> bool:
        return sampler_id in self._records

    def find(self, sampler_id: str, tenant: str) -> SamplerRecord:
        """Raises RequestError (404) for one that is not the tenant's."""
        record = self._records.get(sampler_id)
        if record is None or record.tenant != tenant:
            raise RequestError(
                f"There is no sampler {sampler_id[:100]!r}; it ended with its session, perhaps.",
                status=404,
                code="no_such_sampler",
            )
        return record

    def used(self, sampler_id: str, tenant: str) -> SamplerRecord:
        """`find`, for drawing from it. Raises RequestError (410) for one that was closed."""
        if self._closed.get(sampler_id) == tenant:
            raise RequestError(
                f"The sampler {sampler_id} was closed: a run keeps {self._kept} sets of weights "
                "that no checkpoint has, those used last. Get a new one, or sample from a "
                "checkpoint (save_weights_for_sampler with a name): it stays.",
                status=410,
                code="sampler_closed",
            )
        record = self.find(sampler_id, tenant)
        self._records[sampler_id] = self._records.pop(sampler_id)
        return record

    def open(self, record: SamplerRecord) -> None:
        """A sampler of the base model or of a checkpoint. Raises RequestError (404)."""
        if record.model_path is not None:
            path = parse_path(record.model_path)
            found = self._checkpoints.find(path, record.tenant, reading=True)
            if found.base_model != record.base_model:
                raise RequestError(
                    f"{path} is of the model {found.base_model!r}, not {record.base_model!r}.",
                    code="model_mismatch",
                    param="base_model",
                )
            record = replace(record, weights=found.weights, run_id=found.run_id)
        self.add(record)
        self._hold(record)

    def add(self, record: SamplerRecord) -> None:
        """One whose weights are on the shelf."""
        self._store.write([row(record)])
        self._records[record.sampler_id] = record

    def _hold(self, record: SamplerRecord) -> None:
        """A checkpoint's weights, unless another save has taken their place."""
        if record.model_path is not None:
            save = record.weights.rpartition("@")[2]
            folder = parse_path(record.model_path).folder(self._checkpoints.root, save)
            if folder.is_dir():
                self._shelf.hold(record.weights, record.sampler_id, folder)

    def counts(self) -> Counter[str]:
        """How many there are, by tenant."""
        return Counter(record.tenant for record in list(self._records.values()))

    def of_session(self, session_id: str) -> list[SamplerRecord]:
        return [r for r in self._records.values() if r.session_id == session_id]

    def surplus(self, busy: Container[str]) -> list[SamplerRecord]:
        """Those to be closed: of each run's weights that no checkpoint has all but the ones used
        last, except where a sampler is `busy`."""
        alone: dict[str, dict[str, list[SamplerRecord]]] = {}
        for record in reversed(self._records.values()):
            if self._shelf.is_kept_for_samplers(record.weights):
                of_run = alone.setdefault(record.run_id, {})
                of_run.setdefault(record.weights, []).append(record)
        old = [same for of_run in alone.values() for same in list(of_run.values())[self._kept :]]
        idle = [same for same in old if not any(s.sampler_id in busy for s in same)]
        return [sampler for same in idle for sampler in same]

    async def close_surplus(self, busy: Container[str]) -> None:
        """Their users are told so when they come again."""
        old = self.surplus(busy)
        self._closed |= {record.sampler_id: record.tenant for record in old}
        await self.close(old)

    def forget_closed(self, session_id: str) -> None:
        """The session is over, which is what its user is told from now on."""
        of_session = f"{session_id}:"
        self._closed = {k: t for k, t in self._closed.items() if not k.startswith(of_session)}

    async def close(self, records: Sequence[SamplerRecord]) -> None:
        """Forget them, and weights that were kept for them alone; also when the store fails: a
        new server then has them once more, without weights."""
        if not records:
            return
        try:
            self._store.write([Row("samplers", r.sampler_id, None) for r in records])
        except CheckpointError as error:
            logger.error("%s", error)
        for record in records:
            self._records.pop(record.sampler_id, None)
        for record in records:
            if record.weights:
                await self._shelf.let_go(record.weights, record.sampler_id)


Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class SampleSpec:
    """A sample request, checked."""

    prompt: TokenIds
    num_samples: int
    params: SamplingParams
    stops: Sequence[str] = ()
    prompt_logprobs: bool = False
    top_prompt: int = 0
    last_n: int | None = None
    """Only so many prompt logprobs, from the end."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """One sampled sequence: ids and logprobs [T], and alternatives for each token."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    stopped: bool
    """At a stop token or string; otherwise for its length."""
    top: Sequence[Mapping[int, float]] = ()
    cached: int = 0
    """Prompt tokens that were not computed again for it."""


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What a sample request gave."""

    sequences: Sequence[Drawn]
    prompt_logprobs: Floats | None = None
    """[prompt], NaN where unknown or not asked for."""
    prompt_top: Sequence[Mapping[int, float]] | None = None


class Drawing:
    """Draws sequences and scores prompts."""

    def __init__(self, host: AdapterHost, codec: ChatCodec | None) -> None:
        self._host = host
        self._codec = codec

    async def draw(self, spec: SampleSpec, index: int, weights: str, tenant: str) -> Drawn:
        """The index-th sequence of the request."""
        params = spec.params
        if params.seed is not None:
            params = replace(params, seed=(params.seed + index) % 2**63)
        stops = None
        if spec.stops and self._codec is not None:
            stops = StopStrings(spec.stops, self._codec)
        ids: list[int] = []
        logprobs: list[float] = []
        top: list[dict[int, float]] = []
        stopped, cached = False, 0
        prompt = spec.prompt.tolist()
        stream = self._host.stream(prompt, params, weights=weights, tenant=tenant)
        try:
            async for chunk in stream:
                cached = cached or chunk.prefill_cached
                for i, token in enumerate(chunk.token_ids):
                    ids.append(token)
                    logprobs.append(chunk.logprobs[i])
                    top += [dict(t) for t in chunk.top_logprobs[i : i + 1]]
                    if stops is not None and stops.reached(ids):
                        return Drawn(ids, logprobs, True, top, cached)
                stopped = chunk.finish_reason == "stop"
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()
        return Drawn(ids, logprobs, stopped, top, cached)

    async def score(self, spec: SampleSpec, weights: str) -> Sampled:
        """The prompt's own logprobs, and no sequences."""
        if not spec.prompt_logprobs and not spec.top_prompt:
            return Sampled(())
        prompt = spec.prompt.tolist()
        scores = await self._host.score(prompt, weights=weights, top_k=spec.top_prompt)
        return Sampled((), *_shown(scores, spec))


def _shown(
    scores: Scores, spec: SampleSpec
) -> tuple[Floats | None, Sequence[Mapping[int, float]] | None]:
    """What of the scores was asked for."""
    hidden = 0 if spec.last_n is None else len(spec.prompt) - spec.last_n
    logprobs = np.array(scores.logprobs, np.float32)
    logprobs[:hidden] = np.nan
    top = [dict(t) if i >= hidden else {} for i, t in enumerate(scores.top)]
    return (logprobs if spec.prompt_logprobs else None), (top if spec.top_prompt else None)
