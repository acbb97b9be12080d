"""Turns and places between tenants, by hand-made requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from astuner.engine.embedded.fairness import Turns, beyond_their_share, fair_order
from astuner.engine.embedded.requests import Request
from astuner.types import token_ids

from .tiny import greedy


def request(tenant: str, number: int = 0) -> Request:
    nobody: Any = None
    return Request(token_ids([3]), greedy(), number, nobody, tenant=tenant)


def one(names: Collection[str]) -> bool:
    return len(names) < 2


def two(names: Collection[str]) -> bool:
    return len(names) < 3


def test_tenants_take_turns_whatever_the_number_of_their_weights() -> None:
    turns = Turns()
    at_work = [("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b")]
    seen = [turns.next(at_work, one) for _ in range(8)]
    assert seen == [["a1"], ["b1"], ["a2"], ["b1"], ["a3"], ["b1"], ["a1"], ["b1"]]


def test_what_fits_has_its_turn_together() -> None:
    turns = Turns()
    at_work = [("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("c1", "c")]
    seen = [turns.next(at_work, two) for _ in range(6)]
    # tenants a and b, c and a, ...: each has been there four times
    assert seen == [
        ["a1", "b1"],
        ["c1", "a2"],
        ["b1", "c1"],
        ["a3", "b1"],
        ["c1", "a1"],
        ["b1", "c1"],
    ]
    assert turns.next(at_work, lambda _: True) == ["a1", "a2", "a3", "b1", "c1"]
    assert turns.next([("x", "a"), ("x", "b")], one) == ["x"]


def test_weights_that_another_samples_too_do_not_hold_up_a_tenants_own() -> None:
    turns = Turns()
    at_work = [("", "a"), ("", "b"), ("x", "b"), ("y", "c")]
    seen = [turns.next(at_work, one) for _ in range(6)]
    assert seen == [[""], ["x"], ["y"], [""], ["x"], ["y"]]


def test_newcomers_come_after_all_that_wait_and_without_work_it_is_nobodys_turn() -> None:
    turns = Turns()
    assert turns.next([], one) == []
    assert turns.next([("x", "a"), ("y", "b")], one) == ["x"]
    both = [("z", "c"), ("x", "a"), ("y", "b")]
    assert [turns.next(both, one) for _ in range(4)] == [["y"], ["z"], ["x"], ["y"]]


def test_the_next_place_is_of_the_tenant_with_the_fewest() -> None:
    waiting = [request("a", n) for n in range(4)] + [request("b", n) for n in range(2)]
    held = Counter({"a": 1})
    order: list[tuple[str, int]] = []
    for one in fair_order(waiting, held):
        order.append((one.tenant, one.seed))
        held[one.tenant] += 1
    assert order == [("b", 0), ("a", 0), ("b", 1), ("a", 1), ("a", 2), ("a", 3)]


def test_places_are_given_up_for_those_below_their_share_only() -> None:
    def given(waiting: dict[str, int], held: dict[str, int], places: int = 8) -> list[str]:
        requests = [request(tenant) for tenant, n in waiting.items() for _ in range(n)]
        return beyond_their_share(requests, Counter(held), places)

    assert given({"b": 9}, {"a": 8}) == ["a"] * 4
    assert given({"b": 2}, {"a": 8}) == ["a"] * 2  # no more than is asked for
    assert given({"a": 9}, {"a": 8}) == []  # nobody else waits
    assert given({"b": 9, "a": 9}, {"a": 4, "b": 4}) == []
    assert given({"b": 9}, {"a": 5}) == ["a"]  # three places are free
    assert given({"c": 9}, {"a": 6, "b": 2}) == ["a"] * 2
    assert given({"b": 1, "c": 1, "d": 1}, {"a": 2}, places=2) == ["a"]  # more than places
