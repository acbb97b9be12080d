"""Slots that move and grow, and the radix tree of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from astuner.engine.embedded.kv_cache import (
    KVLayout,
    KVPool,
    PoolFull,
    Slot,
)
from astuner.engine.embedded.prefix_cache import PrefixCache, common_prefix
from astuner.types import TokenIds, token_ids

LAYOUT = KVLayout(2, 1, 4, torch.float32, torch.device("cpu"))


def kv_of(tokens: TokenIds | list[int]) -> torch.Tensor:
    """KV [2, 2, 1, T, 4] in which every number is the token's id."""
    ids = torch.tensor(list(tokens), dtype=torch.float32)
    return ids[None, None, None, :, None].expand(2, 2, 1, -1, 4).clone()


def fill(slot: Slot, value: float) -> None:
    slot.kv[..., : slot.length, :] = value


def values(slot: Slot) -> set[float]:
    return set(slot.kv[..., : slot.length, :].unique().tolist())


def test_layout() -> None:
    assert LAYOUT.bytes_per_token == 2 * 2 * 1 * 4 * 4
    assert LAYOUT.zeros(5).shape == (2, 2, 1, 5, 4)
    assert LAYOUT.zeros(5, 3).shape == (2, 2, 3, 1, 5, 4)


def test_slots_stay_contiguous_when_one_leaves() -> None:
    pool = KVPool(LAYOUT, 10_000, 64)
    slots = [pool.take(10) for _ in range(4)]
    for number, slot in enumerate(slots):
        fill(slot, number)
    pool.release(slots[1])
    assert list(pool.slots()) == [slots[0], slots[3], slots[2]]
    assert [s.index for s in pool.slots()] == [0, 1, 2]
    assert [values(s) for s in pool.slots()] == [{0.0}, {3.0}, {2.0}]


def test_a_sequence_grows_into_a_longer_slot() -> None:
    pool = KVPool(LAYOUT, 10_000, 256)
    a, b = pool.take(63), pool.take(5)
    fill(a, 1)
    fill(b, 2)
    pool.make_room(a)
    assert a.shelf.size == 64  # position 63 is still free
    a.length = 64
    pool.make_room(a)
    assert a.shelf.size == 128
    assert [s.size for s in pool.shelves()] == [64, 128]
    assert list(pool.slots()) == [b, a]
    assert (b.index, a.index) == (0, 0)
    assert values(b) == {2.0}
    assert values(a) == {1.0, 0.0}  # the token at 63 was never written


def test_sizes_of_slots() -> None:
    pool = KVPool(LAYOUT, 100_000, 2048)
    sizes = {length: pool.take(length - 1).shelf.size for length in range(1, 2049, 31)}
    assert sorted(set(sizes.values())) == [
        *range(64, 513, 64),
        *(640, 768, 896, 1024, 1280, 1536, 1792, 2048),
    ]
    for length, size in sizes.items():
        assert length <= size < length + max(64, length / 4)


def test_the_budget_holds_and_unused_slots_are_given_back() -> None:
    pool = KVPool(LAYOUT, 256, 64)
    first = [pool.take(10) for _ in range(4)]
    assert pool.allocated == 256
    assert not pool.fits([10])
    with pytest.raises(PoolFull, match="256 tokens is used up by 4"):
        pool.take(10)
    pool.release(first[0])
    pool.release(first[1])
    assert pool.fits([100])
    assert not pool.fits([100, 10])
    fill(first[2], 7)
    long = pool.take(100)  # two slots of 64 make way for one of 128
    assert long.shelf.size == 128
    assert pool.allocated == 256
    assert values(first[2]) == {7.0}


def test_the_longest_sequence_always_fits() -> None:
    pool = KVPool(LAYOUT, 1, 100)
    slot = pool.take(63)
    slot.length = 64
    pool.make_room(slot)
    assert slot.shelf.size == 128


def test_growing_when_full_changes_nothing() -> None:
    pool = KVPool(LAYOUT, 128, 64)
    a, b = pool.take(63), pool.take(10)
    fill(a, 1)
    a.length = 64
    with pytest.raises(PoolFull):
        pool.make_room(a)
    assert list(pool.slots()) == [a, b]
    assert a.shelf.size == 64


def test_common_prefix() -> None:
    assert common_prefix(token_ids([1, 2, 3]), token_ids([1, 2, 4, 5])) == 2
    assert common_prefix(token_ids([1, 2]), token_ids([1, 2, 4])) == 2
    assert common_prefix(token_ids([]), token_ids([1])) == 0


def test_shared_prefixes_are_stored_once() -> None:
    cache = PrefixCache(LAYOUT, 1000)
    cache.insert(token_ids([1, 2, 3, 4]), kv_of([1, 2, 3, 4]))
    cache.insert(token_ids([1, 2, 5]), kv_of([1, 2, 5]))
    cache.insert(token_ids([1, 2]), kv_of([1, 2]))
    assert cache.tokens == 5
    assert cache.match(token_ids([1, 2, 5, 6])) == 3
    assert cache.match(token_ids([1, 2, 3])) == 3
    assert cache.match(token_ids([9])) == 0
    target = LAYOUT.zeros(6)
    assert cache.read(token_ids([1, 2, 5, 6]), target) == 3
    assert target[0, 0, 0, :, 0].tolist() == [1, 2, 5, 0, 0, 0]
    cache.clear()
    assert (cache.tokens, cache.match(token_ids([1, 2]))) == (0, 0)


def test_least_recently_used_ends_go_first() -> None:
    cache = PrefixCache(LAYOUT, 8)
    for tail in (10, 20, 30):
        cache.insert(token_ids([1, 2, tail, tail]), kv_of([1, 2, tail, tail]))
    assert cache.tokens == 8
    cache.read(token_ids([1, 2, 10]), LAYOUT.zeros(3))
    cache.insert(token_ids([1, 2, 40]), kv_of([1, 2, 40]))
    assert [cache.match(token_ids([1, 2, t, t])) for t in (10, 20, 30, 40)] == [4, 2, 4, 3]
    assert cache.tokens == 7


def test_what_is_too_long_for_the_budget_is_not_kept() -> None:
    cache = PrefixCache(LAYOUT, 3)
    assert not cache.takes(token_ids([1, 2, 3, 4]))
    cache.insert(token_ids([1, 2, 3, 4]), kv_of([1, 2, 3, 4]))
    assert cache.tokens == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12),
    st.integers(1, 40),
)
def test_the_tree_agrees_with_a_list_of_sequences(sequences: list[list[int]], budget: int) -> None:
    """KV read is that of the tokens; within the budget nothing is forgotten."""
    cache = PrefixCache(LAYOUT, budget)
    for number, tokens in enumerate(sequences):
        cache.insert(token_ids(tokens), kv_of(tokens))
        prefixes = {tuple(s[:n]) for s in sequences[: number + 1] for n in range(1, len(s) + 1)}
        assert cache.tokens <= budget
        for other in sequences:
            held = max(n for n in range(len(other) + 1) if n == 0 or tuple(other[:n]) in prefixes)
            target = LAYOUT.zeros(len(other))
            n = cache.read(token_ids(other), target)
            assert n == cache.match(token_ids(other)) <= held
            if len(prefixes) <= budget:
                assert n == held
            assert target[1, 1, 0, :n, 3].tolist() == other[:n]


def test_the_tree_survives_much_use() -> None:
    rng = np.random.default_rng(0)
    cache = PrefixCache(LAYOUT, 60)
    for _ in range(400):
        tokens = token_ids(rng.integers(0, 3, rng.integers(1, 20)))
        target = LAYOUT.zeros(len(tokens))
        n = cache.read(tokens, target)
        assert target[0, 1, 0, :n, 0].tolist() == tokens[:n].tolist()
        cache.insert(tokens, kv_of(tokens))
        assert cache.tokens == sum(len(node.tokens) for node in nodes(cache)) <= 60


def nodes(cache: PrefixCache) -> list:
    roots = list(cache._roots.values())
    found, stack = [], list(roots)
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(node.children.values())
        assert (not node.children and node not in roots) == (node in cache._leaves)
    return found


# ---------------------------------------------------------------- between sequences


def test_what_a_sequence_leaves_behind_is_zero() -> None:
    """The next one there reads it with weight 0, and 0 times NaN is NaN."""
    pool = KVPool(LAYOUT, 10_000, 256)
    bad, good = pool.take(20), pool.take(10)
    bad.kv[..., :21, :] = float("nan")  # the last was written by a pass that broke off
    fill(good, 7)
    pool.release(bad)
    assert good.index == 0 and values(good) == {7.0}
    assert good.kv[..., 10:, :].unique().tolist() == [0.0]
    bad = pool.take(63)
    bad.kv[..., :63, :] = float("inf")
    bad.length = 64
    pool.make_room(bad)  # into a longer slot
    assert bad.shelf.size == 128
    assert all(s.kv[:, :, len(s.slots) :].count_nonzero() == 0 for s in pool._shelves.values())


def test_no_prefix_is_found_under_another_owner() -> None:
    cache, ids = PrefixCache(LAYOUT, 100), token_ids([5, 6, 7, 8])
    mine, other = ("x", "me"), ("x", "you")
    cache.insert(ids, kv_of(ids), mine)
    assert [cache.match(ids, o) for o in (mine, other, ("y", "me"), ("", ""))] == [4, 0, 0, 0]
    cache.insert(ids[:2], kv_of(ids[:2]) * 10, other)
    target = LAYOUT.zeros(4)
    assert cache.read(ids, target, other) == 2
    assert target[0, 0, 0, :, 0].tolist() == [50, 60, 0, 0]
    assert cache.tokens == 6


def test_forgetting_weights_leaves_the_others_and_the_count_right() -> None:
    cache = PrefixCache(LAYOUT, 12)
    for owner in (("x", "a"), ("x", "b"), ("y", "a")):
        for start in (1, 5):
            ids = token_ids(range(start, start + 2))
            cache.insert(ids, kv_of(ids), owner)
    assert cache.tokens == 12 == sum(len(n.tokens) for n in nodes(cache))
    cache.forget("x")
    assert cache.tokens == 4 == sum(len(n.tokens) for n in nodes(cache))
    assert cache.match(token_ids([5, 6]), ("y", "a")) == 2
    ids = token_ids(range(20, 31))  # the oldest end of whoever makes way
    cache.insert(ids, kv_of(ids), ("z", "a"))
    assert cache.tokens == 11 == sum(len(n.tokens) for n in nodes(cache))
    assert cache.match(token_ids([1, 2]), ("y", "a")) == 0


def test_places_given_back_serve_whoever_comes_next() -> None:
    pool = KVPool(LAYOUT, 10_000, 256)
    for _ in range(20):
        slots = [pool.take(10) for _ in range(4)]
        assert pool.allocated == 256
        for slot in slots:
            pool.release(slot)
    pool.clear()
    assert pool.allocated == 0


def test_what_an_owner_does_not_use_for_long_is_forgotten() -> None:
    now = 0.0
    cache = PrefixCache(LAYOUT, 100, clock=lambda: now)
    ids = token_ids([5, 6, 7])
    for owner in (("x", "me"), ("y", "me")):
        cache.insert(ids, kv_of(ids), owner)
    now = 500.0
    assert cache.read(ids, LAYOUT.zeros(3), ("y", "me")) == 3
    now = 700.0
    cache.forget_unused()
    assert [cache.match(ids, (w, "me")) for w in "xy"] == [0, 3]
    assert cache.tokens == 3 == sum(len(n.tokens) for n in nodes(cache))
    cache.insert(ids, kv_of(ids), ("x", "me"))
    assert cache.tokens == 6
