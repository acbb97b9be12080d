"""Continuous batching: which sequences run, and what each tick computes.

A request waits, has all of its prompt but the last token prefilled, and then
decodes with all others until it stops; the last prompt token is simply the
first one fed to a decode tick, so a prompt whose KV is held needs no prefill at
all. Of several waiting requests that share a long prefix, one is prefilled and
the others wait for its KV. Everything runs on the device thread; admission is
first come, first served, and on CPU a request's result does not depend on it,
nor on what was cached, to the last bit.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from astuner.engine.embedded.kv_cache import (
    KVPool,
    PoolFull,
    PrefixCache,
    Slot,
    common_prefix,
    whole_blocks,
)
from astuner.engine.embedded.mailbox import Mailbox, Outbox
from astuner.engine.embedded.plans import Segment
from astuner.engine.embedded.sampling import Draw, Drawn, sample
from astuner.engine.embedded.stats import Counters
from astuner.engine.embedded.steps import SamplingWeights, decode, kv_layout, prefill
from astuner.engine.protocol import SamplingParams, TokenChunk
from astuner.errors import EngineClosed, EngineError
from astuner.types import FinishReason, TokenIds, token_ids

PREFILL_TOKENS = 2048
"""Tokens of one prefill pass; prompts are cut where it is full."""
WORTH_WAITING = 32
"""A request waits for the KV of another if that saves it so many tokens."""


@dataclass(eq=False, slots=True)
class Request:
    """One stream: what was asked, and how far it has come."""

    prompt: TokenIds
    params: SamplingParams
    seed: int
    mailbox: Mailbox
    drawn: list[int] = field(default_factory=list[int])
    cached: int | None = None
    """Prompt tokens found in the prefix cache at the first admission."""
    kv_version: int = -1
    """The weights at admission; KV is shared only while they are still in use."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.drawn)

    @property
    def last_token(self) -> int:
        return self.drawn[-1] if self.drawn else int(self.prompt[-1])

    def fed(self) -> TokenIds:
        """All tokens but the last: those whose KV decoding needs."""
        return np.concatenate([self.prompt, token_ids(self.drawn)])[:-1]

    def finish_reason(self, max_context: int) -> FinishReason | None:
        if self.drawn[-1] in self.params.stop_token_ids:
            return "stop"
        full = len(self.drawn) >= self.params.max_tokens or self.length >= max_context
        return "length" if full else None


@dataclass(eq=False, slots=True)
class _Prefill:
    """An admitted request whose KV is being computed, outside the pool."""

    request: Request
    tokens: TokenIds
    kv: Tensor
    done: int

    @property
    def missing(self) -> int:
        return len(self.tokens) - self.done


class Scheduler:
    """Owns the waiting, prefilling and running requests of one embedded model."""

    def __init__(
        self,
        weights: SamplingWeights,
        *,
        max_context: int,
        max_num_seqs: int,
        pool: KVPool,
        cache: PrefixCache,
    ) -> None:
        self._weights = weights
        self._layout = kv_layout(weights)
        self._max_context = max_context
        self._max_num_seqs = max_num_seqs
        self._pool = pool
        self._cache = cache
        self._version = weights.version
        self._live: set[Request] = set()  # all that were not answered to the end
        self._waiting: deque[Request] = deque()
        self._prefilling: list[_Prefill] = []
        self._running: dict[Slot, Request] = {}  # in order of admission
        self._outbox = Outbox()
        self.counters = Counters()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._prefilling or self._running)

    def add(self, request: Request) -> None:
        self._live.add(request)
        self._waiting.append(request)
        self._count()

    def weights_changed(self) -> None:
        """New weights are published: running sequences go on with the KV they have, and
        nothing computed by the old weights is shared any more."""
        self._version = self._weights.version
        self._cache.clear()

    @torch.inference_mode()
    def tick(self) -> None:
        """Admit, prefill one row, decode one token of every running sequence."""
        self._drop_cancelled()
        self._admit()
        if self._prefilling:
            self._prefill_row()
            self._admit()
        if self._running:
            self._decode()
        self._count()
        self._outbox.flush()

    def fail_all(self, error: EngineError) -> None:
        """End every request with this error and forget all KV."""
        live, self._live = self._live, set()
        self._waiting, self._prefilling, self._running = deque(), [], {}
        self._pool.clear()
        self._cache.clear()
        for request in live:
            self._outbox.put(request.mailbox, _own_copy(error))
        self._count()
        self._outbox.flush()

    # ------------------------------------------------------------ waiting and leaving

    def _admit(self) -> None:
        """Move waiting requests on, in order, as long as there is room."""
        for request in list(self._waiting):
            if len(self._running) + len(self._prefilling) >= self._max_num_seqs:
                return
            tokens = request.fed()
            held = self._cache.match(tokens)
            if self._saves_by_waiting(tokens, held):
                continue
            if not self._has_room(len(tokens), held):
                return
            self._waiting.remove(request)
            self._start(request, tokens, held)

    def _saves_by_waiting(self, tokens: TokenIds, held: int) -> bool:
        for other in self._prefilling:
            if other.request.kv_version != self._version or not self._cache.takes(other.tokens):
                continue
            shared = common_prefix(tokens, other.tokens)
            if shared - held >= WORTH_WAITING or held < shared == len(tokens):
                return True
        return False

    def _has_room(self, length: int, held: int) -> bool:
        """Room in the pool, also for those still prefilling; and prefill buffers, which are
        outside the pool, are kept to about one row's worth."""
        pending = sum(p.missing for p in self._prefilling)
        if held < length and pending >= PREFILL_TOKENS:
            return False
        return self._pool.fits([length, *(len(p.tokens) for p in self._prefilling)])

    def _start(self, request: Request, tokens: TokenIds, held: int) -> None:
        request.kv_version = self._version
        if request.cached is None:
            request.cached = held
            self.counters.prefix_hit_tokens += held
        if held == len(tokens):
            slot = self._pool.take(len(tokens))
            self._cache.read(tokens, slot.kv)
            self._running[slot] = request
        else:
            kv = self._layout.zeros(whole_blocks(len(tokens)))
            self._cache.read(tokens, kv)
            self._prefilling.append(_Prefill(request, tokens, kv, held))

    def _drop_cancelled(self) -> None:
        gone = {request for request in self._live if request.mailbox.cancelled}
        if not gone:
            return
        self._live -= gone
        self._waiting = deque(r for r in self._waiting if r not in gone)
        self._prefilling = [p for p in self._prefilling if p.request not in gone]
        for slot, request in list(self._running.items()):
            if request in gone:
                self._leave(slot)

    def _leave(self, slot: Slot) -> Request:
        """Free a running sequence's slot; its KV stays in the prefix cache."""
        request = self._running.pop(slot)
        if request.kv_version == self._version:
            self._cache.insert(request.fed()[: slot.length], slot.kv)
        self._pool.release(slot)
        return request

    # ------------------------------------------------------------ prefill

    def _prefill_row(self) -> None:
        """One packed row of at most PREFILL_TOKENS; those that are through then run."""
        segments: list[Segment] = []
        tokens: list[TokenIds] = []
        left = PREFILL_TOKENS
        for item in self._prefilling:
            count = min(left, item.missing)
            if count == 0:
                break
            segments.append(Segment(item.kv, item.done, count))
            tokens.append(item.tokens[item.done : item.done + count])
            left -= count
        prefill(self._weights, segments, tokens)
        self.counters.prefilled_tokens += PREFILL_TOKENS - left
        for item, segment in zip(list(self._prefilling), segments, strict=False):
            item.done += segment.tokens
            if item.missing == 0:
                self._prefilling.remove(item)
                self._run(item)

    def _run(self, item: _Prefill) -> None:
        """From prefilled to running; back to waiting if the pool has filled up meanwhile."""
        length = len(item.tokens)
        if item.request.kv_version == self._version:
            self._cache.insert(item.tokens, item.kv)
        try:
            slot = self._pool.take(length)
        except PoolFull:
            self._waiting.appendleft(item.request)
            return
        slot.kv[..., :length, :] = item.kv[..., :length, :]
        self._running[slot] = item.request

    # ------------------------------------------------------------ decode

    def _decode(self) -> None:
        self._make_room()
        slots = list(self._pool.slots())
        requests = [self._running[slot] for slot in slots]
        logits_NV = decode(self._weights, self._pool.shelves, [r.last_token for r in requests])
        drawn = sample(logits_NV, [Draw(r.params, r.seed, len(r.drawn)) for r in requests])
        self.counters.sampled(len(slots))
        for slot in slots:
            slot.length += 1
        for row, (slot, request) in enumerate(zip(slots, requests, strict=True)):
            self._deliver(slot, request, drawn, row)

    def _make_room(self) -> None:
        """Every running sequence stores one more token; the youngest make way if need be."""
        for slot in list(self._running):
            while slot in self._running:
                try:
                    self._pool.make_room(slot)
                    break
                except PoolFull:
                    self._preempt(next(reversed(self._running)))

    def _preempt(self, slot: Slot) -> None:
        if len(self._running) == 1:
            raise EngineError(
                "The KV pool cannot hold a single sequence of this length. "
                "Lower rollout.max_model_len."
            )
        self._waiting.appendleft(self._leave(slot))
        self.counters.preempted += 1

    def _deliver(self, slot: Slot, request: Request, drawn: Drawn, row: int) -> None:
        token, logprob = drawn.tokens[row], drawn.logprobs[row]
        if not np.isfinite(logprob):
            del self._running[slot]
            self._pool.release(slot)
            self._live.discard(request)
            self._outbox.put(request.mailbox, _not_finite(self._weights.version))
            return
        request.drawn.append(token)
        reason = request.finish_reason(self._max_context)
        first = len(request.drawn) == 1
        chunk = TokenChunk(
            (token,),
            (logprob,),
            self._weights.version,
            reason,
            (drawn.top[row],) if request.params.top_logprobs else (),
            (request.cached or 0) if first else 0,
        )
        self._outbox.put(request.mailbox, chunk)
        if reason is not None:
            self._live.discard(request)
            self._leave(slot)

    def _count(self) -> None:
        self.counters.waiting = len(self._waiting)
        self.counters.running = len(self._running) + len(self._prefilling)
        self.counters.cache_tokens = self._cache.tokens


def _own_copy(error: EngineError) -> EngineError:
    """An instance for one request: a traceback is written into it where it is raised."""
    kind = EngineClosed if isinstance(error, EngineClosed) else EngineError
    copy = kind(str(error))
    copy.__cause__ = error.__cause__
    return copy


def _not_finite(version: int) -> EngineError:
    return EngineError(
        f"The model's logits were not finite (weights version {version}). The weights have "
        "diverged: lower the learning rate, or go back to an earlier checkpoint."
    )
