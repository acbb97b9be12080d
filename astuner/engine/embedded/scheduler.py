"""Continuous batching: which sequences run, and what each tick computes.

A request waits, has all of its prompt but the last token prefilled, and then
decodes with all others until it stops; the last prompt token is simply the
first one fed to a decode tick, so a prompt whose KV is held needs no prefill at
all. Of several waiting requests that share a long prefix, one is prefilled and
the others wait for its KV. One tick computes under all weights that are sampled, as
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
from astuner.engine.embedded.kv_cache import KVPool, PoolFull, Slot, whole_blocks
from astuner.engine.embedded.mailbox import Outbox
from astuner.engine.embedded.plans import Segment
from astuner.engine.embedded.prefix_cache import PrefixCache, common_prefix
from astuner.engine.embedded.requests import Prefill, Request
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
        self._running: dict[Slot, Request] = {}  # in order of admission
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
        if any(r.weights in self._turn for r in self._running.values()):
            self._decode()
        self._turn = ()
        self._count()
        self._outbox.flush()

    def _next_turn(self) -> Sequence[str]:
        owners = [p.request.owner for p in self._prefilling]
        at_work = dict.fromkeys(owners + [r.owner for r in self._running.values()])
        while self._apart:
            weights = self._apart.pop()
            if any(weights == name for name, _ in at_work):
                return [weights]
        return self._turns.next(at_work, self._weights.fits)

    def fail_tick(self, error: EngineError) -> None:
        """A tick broke off: end the request that was moved just then, else those of the weights
        it computed with. Of several, each computes alone in the next ticks, and the one whose
        adapter is at fault is found: nothing has changed but for KV that is written again.
        Every request if it was not that far."""
        placing, self._placing = self._placing, None
        turn, self._turn = self._turn, ()
        if placing is not None:
            self._end({placing}, error)
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
            self._pool.clear()

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
        held = Counter(request.tenant for request in self._running.values())
        held.update(item.request.tenant for item in self._prefilling)
        return held

    def _make_way(self, held: Counter[str]) -> None:
        """Whoever has more than a fair share of the places, while others wait for theirs,
        gives up the youngest."""
        if not self._waiting or held.total() < self._max_num_seqs:
            return
        for tenant in beyond_their_share(self._waiting, held, self._max_num_seqs):
            youngest = next(
                (s for s in reversed(self._running) if self._running[s].tenant == tenant), None
            )
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
        """Room in the pool, also for those still prefilling; and prefill buffers, which are
        outside the pool, are kept to about one row's worth."""
        pending = sum(p.missing for p in self._prefilling)
        if held < length and pending >= PREFILL_TOKENS:
            return False
        return self._pool.fits([length, *(len(p.tokens) for p in self._prefilling)])

    def _start(self, request: Request, tokens: TokenIds, held: int) -> None:
        self._placing = request
        request.kv_version = self._weights.version_of(request.weights)
        if request.cached is None:
            request.cached = held
            self.counters.prefix_hit_tokens += held
        if held == len(tokens):
            slot = self._pool.take(len(tokens))
            self._running[slot] = request
            self._cache.read(tokens, slot.kv, request.owner)
        else:
            kv = self._layout.zeros(whole_blocks(len(tokens)))
            self._cache.read(tokens, kv, request.owner)
            self._prefilling.append(Prefill(request, tokens, kv, held))
        self._placing = None

    def _drop_cancelled(self) -> None:
        known = (*self._live, *self._running.values())
        gone = {request for request in known if request.mailbox.cancelled}
        if gone:
            self._drop(gone)
            for slot in [slot for slot, request in self._running.items() if request in gone]:
                self._leave(slot)

    def _drop(self, gone: set[Request]) -> None:
        """Out of all lists but that of the running."""
        self._live -= gone
        self._waiting = deque(r for r in self._waiting if r not in gone)
        self._prefilling = [p for p in self._prefilling if p.request not in gone]

    def _leave(self, slot: Slot) -> Request:
        """Free a running sequence's slot; its KV stays in the prefix cache."""
        request = self._placing = self._running[slot]
        if self._shares_kv(request):
            self._cache.insert(request.fed()[: slot.length], slot.kv, request.owner)
        self._free(slot)
        self._placing = None
        return request

    def _free(self, slot: Slot) -> None:
        del self._running[slot]
        self._pool.release(slot)

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
        if self._shares_kv(item.request):
            self._cache.insert(item.tokens, item.kv, item.request.owner)
        try:
            slot = self._pool.take(length)
        except PoolFull:
            self._waiting.appendleft(item.request)
        else:
            self._running[slot] = item.request
            slot.kv[..., :length, :] = item.kv[..., :length, :]
        self._placing = None

    # ------------------------------------------------------------ decode

    def _decode(self) -> None:
        """One token of each sequence whose turn it is. The others' rows go through the model
        too, so that shelves stay whole: their KV is written again in their turn."""
        self._make_room()
        slots = list(self._pool.slots())
        requests = [self._running[slot] for slot in slots]
        names = [r.weights if r.weights in self._turn else self._turn[0] for r in requests]
        last = [r.last_token for r in requests]
        logits_NV = decode(self._weights, names, self._pool.shelves(), last)
        rows = [row for row, request in enumerate(requests) if request.weights in self._turn]
        if len(rows) < len(requests):
            logits_NV = logits_NV[rows]
        turn = [requests[row] for row in rows]
        drawn = sample(logits_NV, [Draw(r.params, r.seed, len(r.drawn)) for r in turn])
        self.counters.sampled(len(turn))
        for number, (row, request) in enumerate(zip(rows, turn, strict=True)):
            self._deliver(slots[row], request, drawn, number)

    def _make_room(self) -> None:
        """Every sequence stores one more token; if need be the youngest of all make way."""
        for slot, request in list(self._running.items()):
            while slot in self._running:
                self._placing = request
                try:
                    self._pool.make_room(slot)
                    break
                except PoolFull:
                    if len(self._running) == 1:
                        raise EngineError(
                            "The KV pool cannot hold a single sequence of this length. "
                            "Lower rollout.max_model_len."
                        ) from None
                    self._preempt(next(reversed(self._running)))
        self._placing = None

    def _preempt(self, slot: Slot) -> None:
        self._waiting.appendleft(self._leave(slot))
        self.counters.preempted += 1

    def _deliver(self, slot: Slot, request: Request, drawn: Drawn, row: int) -> None:
        self._placing = request
        token, logprob = drawn.tokens[row], drawn.logprobs[row]
        version = self._weights.version_of(request.weights)
        if not np.isfinite(logprob):
            self._placing = None
            self._end({request}, _not_finite(version))
            return
        slot.length += 1
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
            self._leave(slot)
        self._placing = None

    @torch.inference_mode()
    def _end(self, gone: set[Request], error: EngineError) -> None:
        """End these requests with this error."""
        self._drop(gone)
        for request in gone:
            self._outbox.put(request.mailbox, _own_copy(error))
        for slot in [slot for slot, request in self._running.items() if request in gone]:
            self._free(slot)
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
