"""Continuous batching: which sequences run, and what each tick computes.

A request waits, has all of its prompt but the last token prefilled, and then
decodes with all others until it stops; the last prompt token is simply the
first one fed to a decode tick, so a prompt whose KV is held needs no prefill at
all. Of several waiting requests that share a long prefix, one is prefilled and
the others wait for its KV; while they are alike, one row is decoded for all of
them (see `running`). One tick computes under all weights that are sampled, as
far as they fit; else tenants take turns, and the weights of each. Everything runs on
the device thread; a tenant's requests are admitted first come, first served, and on CPU
a request's result does not depend on it, nor on what was cached, nor on what else is
computed with it, to the last bit.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
import torch

from astuner.engine.embedded.fairness import Turns, beyond_their_share, fair_order
from astuner.engine.embedded.kv_cache import KVPool, PoolFull, whole_blocks
from astuner.engine.embedded.mailbox import Outbox
from astuner.engine.embedded.plans import Segment
from astuner.engine.embedded.prefix_cache import PrefixCache, common_prefix
from astuner.engine.embedded.requests import Prefill, Request
from astuner.engine.embedded.running import Running
from astuner.engine.embedded.sampling import Draw, Drawn, sample
from astuner.engine.embedded.stats import Counters
from astuner.engine.embedded.steps import SamplingWeights, decode, kv_layout, prefill
from astuner.engine.protocol import TokenChunk
from astuner.errors import EngineClosed, EngineError
from astuner.types import TokenIds

PREFILL_TOKENS = 2048
"""Tokens of one prefill pass; prompts are cut where it is full."""
WORTH_WAITING = 32
"""A request waits for the KV of another if that saves it so many tokens."""


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
        self._turns = Turns()
        self._turn: Sequence[str] = ()
        """The weights that compute right now."""
        self._apart: list[str] = []
        """Weights that compute alone once each: together they broke off."""
        self._placing: Request | None = None
        """The request that is moved right now: it gets memory, or its token."""
        self._live: set[Request] = set()  # all that were not answered to the end
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Prefill] = []
        self._running = Running(pool)
        self._outbox = Outbox()
        self.counters = Counters()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._prefilling or self._running)

    def add(self, request: Request) -> None:
        try:
            self._weights.version_of(request.weights)
        except EngineError as error:  # there are no such weights
            self._end({request}, error)
            return
        self._live.add(request)
        self._waiting.append(request)
        self._count()

    def weights_changed(self, weights: str = "") -> None:
        """Others go by this name now: running sequences go on with the KV they have, and
        nothing computed by the old weights is shared any more."""
        self._cache.forget(weights)

    @torch.inference_mode()
    def tick(self) -> None:
        """Admit; then, for the weights whose turn it is, prefill one row and decode one
        token of every running sequence."""
        self._cache.forget_unused()
        self._drop_cancelled()
        self._admit()
        self._turn = self._next_turn()
        if any(p.request.weights in self._turn for p in self._prefilling):
            self._prefill_row()
            self._admit()
        if any(r.weights in self._turn for r in self._running):
            self._decode()
        self._turn = ()
        self._count()
        self._outbox.flush()

    def _next_turn(self) -> Sequence[str]:
        owners = [p.request.owner for p in self._prefilling]
        at_work = dict.fromkeys(owners + [r.owner for r in self._running])
        while self._apart:
            weights = self._apart.pop()
            if any(weights == name for name, _ in at_work):
                return [weights]
        return self._turns.next(at_work, self._weights.fits)

    def fail_tick(self, error: EngineError) -> None:
        """A tick broke off: end the request that was moved just then, with all of its slot, else
        those of the weights it computed with. Of several, each computes alone in the next ticks,
        and the one whose adapter is at fault is found: nothing has changed but for KV that is
        written again. Every request if it was not that far."""
        placing, self._placing = self._placing, None
        turn, self._turn = self._turn, ()
        if placing is not None:
            self._end({placing, *self._running.sharing_with(placing)}, error)
        elif len(turn) > 1:
            self._apart = list(turn)
        elif turn:
            self.forget(turn[0], error)
        else:
            self.fail_all(error)

    def forget(self, weights: str, error: EngineError) -> None:
        """End the requests of these weights with this error, and drop their KV."""
        self._cache.forget(weights)
        self._end({request for request in self._live if request.weights == weights}, error)
        if not self._running:
            self._running.clear()

    def fail_all(self, error: EngineError) -> None:
        """End every request with this error and forget all KV."""
        live, self._live = self._live, set()
        self._waiting, self._prefilling = deque(), []
        self._running.clear()
        self._cache.clear()
        for request in live:
            self._outbox.put(request.mailbox, _own_copy(error))
        self._count()
        self._outbox.flush()

    # ------------------------------------------------------------ waiting and leaving

    def _admit(self) -> None:
        """Move waiting requests on, in order, as long as there is room."""
        held = self._held()
        self._make_way(held)
        for request in fair_order(self._waiting, held):
            if held.total() >= self._max_num_seqs:
                return
            tokens = request.fed()
            known = self._cache.match(tokens, request.owner)
            if self._saves_by_waiting(request, tokens, known):
                continue
            if not self._has_room(len(tokens), known):
                return
            self._waiting.remove(request)
            held[request.tenant] += 1
            self._start(request, tokens, known)

    def _held(self) -> Counter[str]:
        """How many places each tenant has."""
        held = Counter(request.tenant for request in self._running)
        held.update(item.request.tenant for item in self._prefilling)
        return held

    def _make_way(self, held: Counter[str]) -> None:
        """Whoever has more than a fair share of the places, while others wait for theirs,
        gives up the youngest."""
        if not self._waiting or held.total() < self._max_num_seqs:
            return
        for tenant in beyond_their_share(self._waiting, held, self._max_num_seqs):
            youngest = next((r for r in reversed(self._running) if r.tenant == tenant), None)
            if youngest is not None:
                self._preempt(youngest)
                held[tenant] -= 1

    def _saves_by_waiting(self, request: Request, tokens: TokenIds, held: int) -> bool:
        for other in self._prefilling:
            if other.request.owner != request.owner or not self._shares_kv(other.request):
                continue
            if not self._cache.takes(other.tokens):
                continue
            shared = common_prefix(tokens, other.tokens)
            if shared - held >= WORTH_WAITING or held < shared == len(tokens):
                return True
        return False

    def _shares_kv(self, request: Request) -> bool:
        """Whether all of its KV is of the weights as they are now."""
        return request.kv_version == self._weights.version_of(request.weights)

    def _has_room(self, length: int, held: int) -> bool:
        """Room in the pool, also for those still prefilling and those that will part; and prefill
        buffers, which are outside the pool, are kept to about one row's worth."""
        pending = sum(p.missing for p in self._prefilling)
        if held < length and pending >= PREFILL_TOKENS:
            return False
        coming = [len(p.tokens) for p in self._prefilling]
        return self._pool.fits([length, *coming, *self._running.to_be_parted()])

    def _start(self, request: Request, tokens: TokenIds, held: int) -> None:
        self._placing = request
        request.kv_version = self._weights.version_of(request.weights)
        joined = self._running.join(request, tokens)
        if request.cached is None:
            request.cached = len(tokens) if joined else held
            self.counters.prefix_hit_tokens += request.cached
        if not joined and held == len(tokens):
            slot = self._running.place(request, tokens)
            self._cache.read(tokens, slot.kv, request.owner)
        elif not joined:
            kv = self._layout.zeros(whole_blocks(len(tokens)))
            self._cache.read(tokens, kv, request.owner)
            self._prefilling.append(Prefill(request, tokens, kv, held))
        self._placing = None

    def _drop_cancelled(self) -> None:
        known = (*self._live, *self._running)
        gone = {request for request in known if request.mailbox.cancelled}
        if gone:
            self._drop(gone)
            for request in [request for request in self._running if request in gone]:
                self._leave(request)

    def _drop(self, gone: set[Request]) -> None:
        """Out of all lists but that of the running."""
        self._live -= gone
        self._waiting = deque(r for r in self._waiting if r not in gone)
        self._prefilling = [p for p in self._prefilling if p.request not in gone]

    def _leave(self, request: Request) -> None:
        """Out of the running; its KV stays in the prefix cache."""
        self._placing = request
        if self._shares_kv(request):
            slot = self._running.slot_of(request)
            self._cache.insert(request.fed()[: slot.length], slot.kv, request.owner)
        self._running.remove(request)
        self._placing = None

    # ------------------------------------------------------------ prefill

    def _prefill_row(self) -> None:
        """One packed row of at most PREFILL_TOKENS; those that are through then run."""
        waiting = [item for item in self._prefilling if item.request.weights in self._turn]
        segments: list[Segment] = []
        tokens: list[TokenIds] = []
        left = PREFILL_TOKENS
        for item in waiting:
            count = min(left, item.missing)
            if count == 0:
                break
            segments.append(Segment(item.kv, item.done, count))
            tokens.append(item.tokens[item.done : item.done + count])
            left -= count
        names = [item.request.weights for item in waiting[: len(segments)]]
        prefill(self._weights, names, segments, tokens)
        self.counters.prefilled_tokens += PREFILL_TOKENS - left
        for item, segment in zip(waiting, segments, strict=False):
            item.done += segment.tokens
            if item.missing == 0:
                self._prefilling.remove(item)
                self._run(item)

    def _run(self, item: Prefill) -> None:
        """From prefilled to running; back to waiting if the pool has filled up meanwhile."""
        length = len(item.tokens)
        self._placing = item.request
        shares_kv = self._shares_kv(item.request)
        if shares_kv:
            self._cache.insert(item.tokens, item.kv, item.request.owner)
        try:
            if not (shares_kv and self._running.join(item.request, item.tokens)):
                slot = self._running.place(item.request, item.tokens)
                slot.kv[..., :length, :] = item.kv[..., :length, :]
        except PoolFull:
            self._waiting.appendleft(item.request)
        self._placing = None

    # ------------------------------------------------------------ decode

    def _decode(self) -> None:
        """One token of each sequence whose turn it is. The others' rows go through the model
        too, so that shelves stay whole: their KV is written again in their turn."""
        self._make_room()
        rows = self._running.rows()
        first = [requests[0] for _, requests in rows]
        turn = [row for row, request in enumerate(first) if request.weights in self._turn]
        if not turn:  # they made way
            return
        names = [r.weights if r.weights in self._turn else self._turn[0] for r in first]
        last = [r.last_token for r in first]
        logits_NV = decode(self._weights, names, self._pool.shelves(), last)
        requests = [request for row in turn for request in rows[row][1]]
        of_requests = [row for row in turn for _ in rows[row][1]]
        draws = [Draw(r.params, r.seed, len(r.drawn)) for r in requests]
        drawn = sample(logits_NV, draws, of_requests)
        self.counters.sampled(len(requests))
        number = 0
        for slot, sharing in (rows[row] for row in turn):
            slot.length += 1
            for request in sharing:
                self._deliver(request, drawn, number)
                number += 1

    def _make_room(self) -> None:
        """Every sequence stores one more token; if need be the youngest of all make way."""
        self._running.begin()
        for request in list(self._running):
            while request in self._running:
                self._placing = request
                try:
                    self._running.make_room(request)
                    break
                except PoolFull:
                    if len(self._running) == 1:
                        raise EngineError(
                            "The KV pool cannot hold a single sequence of this length. "
                            "Lower rollout.max_model_len."
                        ) from None
                    self._preempt(next(reversed(self._running)))
        self._placing = None

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self._waiting.appendleft(request)
        self.counters.preempted += 1

    def _deliver(self, request: Request, drawn: Drawn, row: int) -> None:
        self._placing = request
        token, logprob = drawn.tokens[row], drawn.logprobs[row]
        version = self._weights.version_of(request.weights)
        if not np.isfinite(logprob):
            self._placing = None
            self._end({request}, _not_finite(version))
            return
        request.drawn.append(token)
        reason = request.finish_reason(self._max_context)
        first = len(request.drawn) == 1
        chunk = TokenChunk(
            (token,),
            (logprob,),
            version,
            reason,
            (drawn.top[row],) if request.params.top_logprobs else (),
            (request.cached or 0) if first else 0,
        )
        self._outbox.put(request.mailbox, chunk)
        if reason is not None:
            self._live.discard(request)
            self._leave(request)
        self._placing = None

    @torch.inference_mode()
    def _end(self, gone: set[Request], error: EngineError) -> None:
        """End these requests with this error."""
        self._drop(gone)
        for request in gone:
            self._outbox.put(request.mailbox, _own_copy(error))
        for request in [request for request in self._running if request in gone]:
            self._running.remove(request)
        self._count()
        self._outbox.flush()

    def _count(self) -> None:
        self.counters.waiting = len(self._waiting)
        self.counters.running = len(self._running) + len(self._prefilling)
        self.counters.cache_tokens = self._cache.tokens
        self.counters.pool_tokens = self._pool.allocated


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
