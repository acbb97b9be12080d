"""The scheduler tick by tick: what is prefilled, who waits, who makes way."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from astuner.engine.embedded import plans
from astuner.engine.embedded.kv_cache import KVLayout, KVPool
from astuner.engine.embedded.mailbox import Mailbox, Outbox
from astuner.engine.embedded.prefix_cache import PrefixCache
from astuner.engine.embedded.sampling import sample
from astuner.engine.embedded.scheduler import Request, Scheduler
from astuner.engine.embedded.steps import kv_layout
from astuner.engine.protocol import SamplingParams, TokenChunk
from astuner.errors import EngineClosed, EngineError
from astuner.types import token_ids

from .tiny import ManyWeights, TinyWeights, greedy, prompt

pytestmark = pytest.mark.timeout(60)


class Bench:
    """A scheduler without a thread, and what its requests have received."""

    def __init__(self, *, pool: int = 10_000, cache: int = 10_000, **settings: Any) -> None:
        dtype, names = settings.pop("dtype", torch.float32), settings.pop("names", ())
        self.weights = ManyWeights(names, dtype) if names else TinyWeights(dtype=dtype)
        layout = kv_layout(self.weights)
        context = settings.pop("max_context", 512)
        self.scheduler = Scheduler(
            self.weights,
            max_context=context,
            max_num_seqs=settings.pop("max_num_seqs", 64),
            pool=KVPool(layout, pool, context),
            cache=PrefixCache(layout, cache),
        )
        self.counters = self.scheduler.counters
        self.requests: list[Request] = []

    def add(self, ids: list[int], params: SamplingParams | None = None, **whose: str) -> Request:
        params = params or greedy(4)
        request = Request(token_ids(ids), params, params.seed or 0, Mailbox(), **whose)
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def run(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                return
            self.scheduler.tick()
        raise AssertionError(f"still at work after {limit} ticks")

    def rows(self) -> list[int]:
        """Lengths of the forward passes since the last time."""
        rows, self.weights.forward_rows = self.weights.forward_rows, []
        return rows


def chunks(request: Request) -> list[TokenChunk]:
    return [item for item in request.mailbox._items if isinstance(item, TokenChunk)]


def drawn(request: Request) -> list[int]:
    return [token for chunk in chunks(request) for token in chunk.token_ids]


def logprobs(request: Request) -> list[float]:
    return [logprob for chunk in chunks(request) for logprob in chunk.logprobs]


async def test_the_repeats_of_a_group_are_prefilled_once() -> None:
    bench = Bench()
    ids = prompt(0, 41)
    for _ in range(10):
        bench.add(ids)
    bench.scheduler.tick()
    assert bench.rows() == [40, 8]  # the prompt but its last token; then one row, padded
    assert bench.counters.running == 10
    bench.run()
    assert {tuple(drawn(r)) for r in bench.requests} == {tuple(drawn(bench.requests[0]))}
    assert [chunks(r)[0].prefill_cached for r in bench.requests] == [0] + [40] * 9
    assert [c.prefill_cached for c in chunks(bench.requests[1])] == [40, 0, 0, 0]


async def test_prompts_that_share_a_long_prefix_wait_for_it() -> None:
    bench = Bench()
    system = prompt(0, 49)
    questions = [[*system, 5, *prompt(1, 10)], [*system, 6, *prompt(2, 10)], [*system, 7, 8, 9]]
    for ids in questions:
        bench.add(ids)
    bench.scheduler.tick()
    # tick 1: the first prompt whole (59, padded to 64), then its first token
    assert bench.rows() == [64, 8]
    assert (bench.counters.running, bench.counters.waiting) == (3, 0)
    bench.scheduler.tick()
    # tick 2: what is new in the other two, 10 + 2 tokens, then three rows
    assert bench.rows() == [16, 8]
    assert bench.counters.prefilled_tokens == 59 + 10 + 2
    assert bench.counters.prefix_hit_tokens == 2 * 49


async def test_prompts_that_share_little_go_together() -> None:
    bench = Bench()
    system = prompt(0, 20)
    for seed in (1, 2):
        bench.add([*system, seed + 3, *prompt(seed, 10)])
    bench.scheduler.tick()
    assert bench.rows() == [64, 8]  # 30 + 30 tokens in one row


async def test_the_attention_of_other_devices_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astuner.engine.embedded.scheduler.PREFILL_TOKENS", 64)
    blocks = Bench()
    expected = blocks.add(prompt(0, 150))
    blocks.run()
    monkeypatch.setattr(plans, "_in_blocks", plans._fused)
    monkeypatch.setattr(plans, "_block_masks", plans._causal_masks)
    fused = Bench()
    request = fused.add(prompt(0, 150))  # cut at 64 and 128: without a past, and with one
    fused.run()
    assert drawn(request) == drawn(expected)
    assert logprobs(request) == pytest.approx(logprobs(expected), abs=1e-5)


async def test_the_next_turn_prefills_only_what_is_new() -> None:
    bench = Bench()
    first = bench.add(prompt(0, 40), greedy(7))
    bench.run()
    follow = [*prompt(0, 40), *drawn(first), *prompt(9, 20)]
    second = bench.add(follow)
    alone = Bench()
    same = alone.add(follow)
    bench.run()
    alone.run()
    # 40 + 7 tokens, of which the last drawn was never fed
    assert chunks(second)[0].prefill_cached == 46
    assert bench.counters.prefilled_tokens == 39 + (40 + 7 + 20 - 1 - 46)
    assert logprobs(second) == logprobs(same)  # whether decoded or prefilled
    assert drawn(second) == drawn(same)


async def test_prefill_row_has_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astuner.engine.embedded.scheduler.PREFILL_TOKENS", 64)
    bench = Bench()
    for seed, length in ((1, 31), (2, 31), (3, 31), (4, 151)):
        bench.add(prompt(seed, length))
    ticks = []
    for _ in range(4):
        bench.scheduler.tick()
        ticks.append(bench.rows())
    # 30 + 30 + 4 | 26, and as the longest was admitted only then, 38 of its 150 | 64 | 48
    assert [t[0] for t in ticks] == [64, 64, 64, 48]
    assert all(t[1:] == [8] for t in ticks)


async def test_no_more_than_max_num_seqs_and_in_order() -> None:
    bench = Bench(max_num_seqs=2)
    order: list[int] = []
    for seed in range(5):
        bench.add(prompt(seed, 5), greedy(3))
    while bench.scheduler.has_work:
        bench.scheduler.tick()
        assert bench.counters.running <= 2
        order += [i for i, r in enumerate(bench.requests) if len(r.drawn) == 1 and i not in order]
    assert order == [0, 1, 2, 3, 4]
    assert [len(drawn(r)) for r in bench.requests] == [3] * 5


def roomy_and_tight(prompts: list[list[int]]) -> tuple[Bench, Bench]:
    """The same requests in a large pool and in one where some have to make way."""
    roomy, tight = Bench(max_context=128), Bench(max_context=128, pool=1)
    for bench in (roomy, tight):
        for seed, ids in enumerate(prompts):
            bench.add(ids, SamplingParams(max_tokens=60, seed=seed))
        bench.run()
    assert roomy.counters.preempted == 0
    assert tight.counters.preempted > 0
    for a, b in zip(roomy.requests, tight.requests, strict=True):
        assert len(drawn(a)) == 60
        assert drawn(a) == drawn(b)
        assert logprobs(a) == logprobs(b)
    return roomy, tight


async def test_the_youngest_makes_way_when_the_pool_is_full() -> None:
    _, tight = roomy_and_tight([prompt(seed, 30) for seed in range(6)])
    for request in tight.requests:
        assert sum(c.prefill_cached for c in chunks(request)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_repeats_are_one_row_until_they_part(dtype: torch.dtype) -> None:
    bench, alone = Bench(dtype=dtype), Bench(dtype=dtype)
    params = [SamplingParams(max_tokens=12, seed=seed) for seed in range(24)]
    for one in params:
        bench.add(prompt(0, 41), one)
    bench.run()
    for one, request in zip(params, bench.requests, strict=True):
        expected = alone.add(prompt(0, 41), one)
        alone.run()
        assert drawn(request) == drawn(expected)
        assert logprobs(request) == logprobs(expected)
    histories = [{tuple(drawn(r)[:n]) for r in bench.requests} for n in range(12)]
    assert len(histories[0]) == 1 < len(histories[1]) < len(histories[11]) == 24
    assert bench.rows()[1:] == [-(-len(different) // 8) * 8 for different in histories]


async def test_those_that_draw_alike_stay_one_row() -> None:
    bench = Bench()
    for _ in range(20):
        bench.add(prompt(0, 60), greedy(10))  # its slot grows on the way
    bench.run()
    assert bench.rows()[1:] == [8] * 10
    assert {tuple(drawn(r)) for r in bench.requests} == {tuple(drawn(bench.requests[0]))}


async def test_repeats_that_have_no_room_to_part_make_way() -> None:
    roomy_and_tight([prompt(0, 30)] * 6)


async def test_repeats_leave_a_row_without_the_others() -> None:
    bench = Bench()
    for tokens in (1, 3, 5, 50):
        bench.add(prompt(0, 20), greedy(tokens))
    for _ in range(3):
        bench.scheduler.tick()
    bench.requests[3].mailbox.cancelled = True
    bench.run()
    assert [len(drawn(r)) for r in bench.requests] == [1, 3, 5, 3]
    again = bench.add(prompt(0, 20), greedy(5))
    bench.run()
    assert drawn(again) == drawn(bench.requests[2])


async def test_tenants_and_later_repeats_have_rows_of_their_own() -> None:
    bench = Bench()
    for tenant in ("a", "b"):
        for _ in range(6):
            bench.add(prompt(0, 20), greedy(9), tenant=tenant)
    bench.scheduler.tick()
    later = bench.add(prompt(0, 20), greedy(9), tenant="a")
    bench.scheduler.tick()
    assert sum(1 for _ in bench.scheduler._pool.slots()) == 3
    bench.run()
    assert {tuple(drawn(r)) for r in bench.requests} == {tuple(drawn(later))}


async def test_a_row_that_breaks_off_ends_with_all_who_share_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    for seed in (0, 0, 0, 1):
        bench.add(prompt(seed, 20))
    finish = Request.finish_reason

    def breaks(request: Request, max_context: int) -> Any:
        if request is bench.requests[1]:
            raise MemoryError
        return finish(request, max_context)

    with monkeypatch.context() as patch:
        patch.setattr(Request, "finish_reason", breaks)
        with pytest.raises(MemoryError):
            bench.scheduler.tick()
    bench.scheduler.fail_tick(EngineError("no memory"))
    bench.run()
    for request in bench.requests[:3]:
        assert isinstance(request.mailbox._items[-1], EngineError)
    alone = Bench()
    expected = alone.add(prompt(1, 20))
    alone.run()
    assert drawn(bench.requests[3]) == drawn(expected)


async def test_a_prefix_cache_too_small_for_anything() -> None:
    bench = Bench(cache=1)
    for _ in range(3):
        bench.add(prompt(0, 41))
    bench.scheduler.tick()
    assert bench.rows() == [120, 8]  # nobody waits for what cannot be kept
    bench.run()
    assert {tuple(drawn(r)) for r in bench.requests} == {tuple(drawn(bench.requests[0]))}


async def test_new_weights_amid_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astuner.engine.embedded.scheduler.PREFILL_TOKENS", 64)
    bench = Bench()
    first = bench.add(prompt(0, 150))
    bench.scheduler.tick()
    bench.weights.publish()
    bench.scheduler.weights_changed()
    second = bench.add(prompt(0, 150))
    bench.run()
    assert {c.weight_version for c in chunks(first)} == {1}
    assert chunks(second)[0].prefill_cached == 0  # the first one's KV is of two versions
    fresh = Bench()
    fresh.weights.publish()
    fresh.scheduler.weights_changed()
    expected = fresh.add(prompt(0, 150))
    fresh.run()
    assert drawn(second) == drawn(expected)


async def test_kv_of_a_sequence_that_saw_two_versions_is_not_shared() -> None:
    bench = Bench()
    request = bench.add(prompt(0, 40), greedy(10))
    bench.scheduler.tick()
    bench.weights.publish()
    bench.scheduler.weights_changed()
    bench.run()
    assert [c.weight_version for c in chunks(request)] == [0] + [1] * 9
    assert bench.counters.cache_tokens == 0


async def test_cancelled_requests_leave_at_the_next_tick() -> None:
    bench = Bench(max_num_seqs=2)
    for seed in range(3):
        bench.add(prompt(seed, 10), greedy(50))
    bench.scheduler.tick()
    for request in bench.requests[1:]:
        request.mailbox.cancelled = True  # one runs, one waits
    bench.scheduler.tick()
    assert (bench.counters.running, bench.counters.waiting) == (1, 0)
    bench.run()
    assert [len(drawn(r)) for r in bench.requests] == [50, 1, 0]


async def test_the_repeats_go_on_when_the_one_they_wait_for_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("astuner.engine.embedded.scheduler.PREFILL_TOKENS", 64)
    bench = Bench()
    for _ in range(3):
        bench.add(prompt(0, 150))
    bench.scheduler.tick()
    assert bench.counters.waiting == 2
    bench.requests[0].mailbox.cancelled = True
    bench.run()
    assert [len(drawn(r)) for r in bench.requests] == [0, 4, 4]


async def test_failing_reaches_every_request_even_one_between_two_lists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(max_num_seqs=2)
    for seed in range(4):
        bench.add(prompt(seed, 10))

    def no_memory(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(PrefixCache, "read", no_memory)  # after it has left the waiting list
        with pytest.raises(MemoryError):
            bench.scheduler.tick()
    bench.scheduler.fail_all(EngineClosed("gone"))
    for request in bench.requests:
        with pytest.raises(EngineClosed, match="gone"):
            await request.mailbox.take()
    assert not bench.scheduler.has_work
    again = bench.add(prompt(0, 10))
    bench.run()
    assert len(drawn(again)) == 4


async def test_chunks_that_wait_are_joined_by_version() -> None:
    mailbox, outbox = Mailbox(), Outbox()
    outbox.put(mailbox, TokenChunk((1,), (-0.5,), 0, prefill_cached=9))
    outbox.put(mailbox, TokenChunk((2,), (-0.25,), 0))
    outbox.put(mailbox, TokenChunk((3,), (-1.0,), 1))
    outbox.put(mailbox, TokenChunk((4,), (-2.0,), 1, "stop"))
    outbox.put(mailbox, EngineError("late"))
    assert await mailbox.take() == TokenChunk((1, 2), (-0.5, -0.25), 0, prefill_cached=9)
    assert await mailbox.take() == TokenChunk((3, 4), (-1.0, -2.0), 1, "stop")
    with pytest.raises(EngineError, match="late"):
        await mailbox.take()


async def test_a_mailbox_wakes_its_reader() -> None:
    mailbox, outbox = Mailbox(), Outbox()
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    outbox.put(mailbox, TokenChunk((1,), (0.0,), 0))
    outbox.flush()
    assert (await asyncio.wait_for(reader, 5)).token_ids == (1,)


def test_a_closed_loop_cancels() -> None:
    async def make() -> Mailbox:
        return Mailbox()

    mailbox, outbox = asyncio.run(make()), Outbox()
    outbox.put(mailbox, TokenChunk((1,), (0.0,), 0))
    outbox.flush()
    assert mailbox.cancelled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_random_traffic_ends_and_is_exact(dtype: torch.dtype) -> None:
    """Many requests of many kinds, in a pool and a cache that are too small: each gets
    bitwise what it gets alone."""
    rng = np.random.default_rng(1)
    bench = Bench(dtype=dtype, max_context=200, pool=600, cache=300, max_num_seqs=9)
    alone = Bench(dtype=dtype)
    wanted: list[tuple[list[int], SamplingParams]] = []
    for i in range(25):
        ids = prompt(int(rng.integers(0, 4)), int(rng.choice([1, 30, 64, 90, 119])))
        fields = {"temperature": float(rng.choice([0, 0.7, 1])), "seed": i}
        wanted.append((ids, SamplingParams(max_tokens=int(rng.integers(1, 70)), **fields)))
    for ids, params in wanted:
        bench.add(ids, params)
        if rng.random() < 0.4:
            bench.scheduler.tick()
        if rng.random() < 0.1:
            rng.choice(np.array(bench.requests)).mailbox.cancelled = True
    bench.run()
    assert bench.counters.preempted > 0
    for (ids, params), request in zip(wanted, bench.requests, strict=True):
        if request.mailbox.cancelled:
            continue
        expected = alone.add(ids, params)
        alone.run()
        assert drawn(request) == drawn(expected)
        assert logprobs(request) == logprobs(expected)


# ---------------------------------------------------------------- several weights

NAMES = ["x", "y", "z"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_weights_that_take_turns_give_what_each_gives_alone(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(2)
    bench = Bench(dtype=dtype, names=NAMES, pool=700, cache=400, max_context=200, max_num_seqs=9)
    alone = {name: Bench(dtype=dtype, names=NAMES) for name in NAMES}
    wanted = [
        (
            prompt(int(rng.integers(0, 3)), int(rng.integers(1, 90))),
            SamplingParams(max_tokens=int(rng.integers(1, 60)), seed=i),
            NAMES[i % 3],
        )
        for i in range(24)
    ]
    for ids, params, name in wanted:
        bench.add(ids, params, weights=name)
        if rng.random() < 0.4:
            bench.scheduler.tick()
    bench.run()
    assert bench.counters.preempted > 0
    for (ids, params, name), request in zip(wanted, bench.requests, strict=True):
        expected = alone[name].add(ids, params, weights=name)
        alone[name].run()
        assert drawn(request) == drawn(expected)
        assert logprobs(request) == logprobs(expected)


async def test_a_tenant_finds_nothing_of_another_in_the_cache() -> None:
    bench = Bench(names=NAMES)
    ids = prompt(0, 41)

    def cached(**whose: str) -> int:
        request = bench.add(ids, **whose)
        bench.run()
        return chunks(request)[0].prefill_cached

    assert cached(weights="x", tenant="me") == 0
    assert cached(weights="x", tenant="me") == 40
    assert cached(weights="x", tenant="you") == 0
    assert cached(weights="y", tenant="me") == 0
    first, second = (bench.add(prompt(1, 41), weights="x", tenant=t) for t in ("me", "you"))
    bench.run()  # nor does it wait for the other's prefill
    assert [chunks(r)[0].prefill_cached for r in (first, second)] == [0, 0]


async def test_turns_are_fair_however_many_sequences_each_has() -> None:
    bench = Bench(names=NAMES)
    for seed in range(6):
        bench.add(prompt(seed, 1), greedy(12), weights="x")
    bench.scheduler.tick()
    bench.add(prompt(9, 1), greedy(12), weights="y")
    bench.scheduler.tick()
    bench.add(prompt(8, 1), greedy(12), weights="z")
    for _ in range(10):
        bench.scheduler.tick()
    turns = bench.weights.turns
    assert turns[:2] == ["x", "x"]  # y has just come
    assert [sorted(turns[i : i + 3]) for i in (3, 6, 9)] == [NAMES] * 3


async def test_all_whose_turn_it_is_may_make_way(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(names=("x", "y"), max_context=128, pool=1)
    bench.add(prompt(0, 60), greedy(40), weights="x")  # grows beyond 64 tokens in y's turn
    bench.add(prompt(1, 80), greedy(20), weights="y")
    drew: list[int] = []

    def counted(logits: Any, draws: Any, rows: Any) -> Any:
        drew.append(len(draws))
        return sample(logits, draws, rows)

    monkeypatch.setattr("astuner.engine.embedded.scheduler.sample", counted)
    bench.run()
    assert [len(drawn(r)) for r in bench.requests] == [40, 20]
    assert bench.counters.preempted > 0
    assert set(drew) == {1}


async def test_weights_that_fail_take_no_others_with_them() -> None:
    bench = Bench(names=NAMES)
    bad, good = (bench.add(prompt(0, 41), greedy(6), weights=name) for name in ("x", "y"))
    bench.scheduler.tick()
    bench.scheduler.tick()
    bench.weights.fail_for = "x"
    with pytest.raises(RuntimeError, match="no such luck with x"):
        bench.run()
    bench.scheduler.fail_tick(EngineError("it broke"))
    bench.run()
    assert len(drawn(good)) == 6
    assert isinstance(bad.mailbox._items[-1], EngineError)
    assert bench.counters.running == 0
    assert list(bench.scheduler._pool.slots()) == []
    bench.weights.fail_for = ""
    again = bench.add(prompt(0, 41), greedy(6), weights="x")
    bench.run()
    assert chunks(again)[0].prefill_cached == 0 and len(drawn(again)) == 6


async def test_forgetting_weights_ends_their_streams_and_frees_their_kv() -> None:
    bench = Bench(names=NAMES, max_num_seqs=2)
    gone = [bench.add(prompt(seed, 41), greedy(50), weights="x") for seed in range(2)]
    gone.append(bench.add(prompt(2, 41), weights="x"))  # waits
    kept = bench.add(prompt(0, 41), weights="y")
    for _ in range(3):
        bench.scheduler.tick()
    bench.scheduler.forget("x", EngineError("released"))
    for request in gone:
        with pytest.raises(EngineError, match="released"):
            while True:
                await asyncio.wait_for(request.mailbox.take(), 5)
    assert bench.scheduler._pool.allocated == 0 and bench.counters.cache_tokens == 0
    bench.run()
    assert len(drawn(kept)) == 4


# ---------------------------------------------------------------- several tenants


async def test_a_tenant_with_many_requests_leaves_another_its_share() -> None:
    bench, alone = Bench(max_num_seqs=4), Bench()
    many = [bench.add(prompt(i, 20), greedy(60), tenant="many") for i in range(9)]
    for _ in range(3):
        bench.scheduler.tick()
    few = [bench.add(prompt(50 + i, 20), greedy(10), tenant="few") for i in range(3)]
    bench.scheduler.tick()
    running = Counter(r.tenant for r in bench.scheduler._running)
    assert running == {"many": 2, "few": 2} and bench.counters.preempted == 2
    for _ in range(30):
        bench.scheduler.tick()
    assert [len(drawn(r)) for r in few] == [10, 10, 10]
    assert not any(len(drawn(r)) == 60 for r in many)
    bench.run()
    for request in many:
        expected = alone.add(request.prompt.tolist(), greedy(60))
        alone.run()
        assert drawn(request) == drawn(expected) and logprobs(request) == logprobs(expected)


@pytest.mark.parametrize("length", [300, 20])
async def test_want_of_memory_for_one_prompt_is_that_requests_alone(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its prefill buffer is made; and when it takes its place among the running."""
    bench = Bench()
    other = bench.add(prompt(0, 40), greedy(30), tenant="other")
    bench.scheduler.tick()
    zeros, refused = KVLayout.zeros, (320, None) if length == 300 else (64, 2)

    def no_memory(self: KVLayout, tokens: int, slots: int | None = None) -> torch.Tensor:
        if (tokens, slots) == refused:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return zeros(self, tokens, slots)

    monkeypatch.setattr(KVLayout, "zeros", no_memory)
    request = bench.add(prompt(1, length), greedy(30), tenant="one")
    with pytest.raises(RuntimeError):
        bench.scheduler.tick()
    bench.scheduler.fail_tick(EngineError("out of memory"))
    assert [type(i) for i in request.mailbox._items] == [EngineError]
    bench.run()
    assert len(drawn(other)) == 30
