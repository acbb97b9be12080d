"""Who stays on the device, and who makes way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from astuner.engine.embedded.residency import Residency

GPU = torch.device("meta")


@dataclass(eq=False)
class Thing:
    nbytes: int = 10
    moves: list[str] = field(default_factory=list[str])

    def move(self, device: torch.device) -> None:
        self.moves.append(device.type)


def test_the_least_recently_used_makes_way_and_comes_back() -> None:
    residency = Residency(GPU, budget=25)
    a, b, c = Thing(), Thing(), Thing()
    for thing in (a, b, a, c):  # b was used longest ago
        residency.use(thing)
    assert (a.moves, b.moves, c.moves) == ([], ["cpu"], [])
    assert (residency.resident_bytes, residency.swapped_bytes, residency.swaps) == (20, 10, 0)
    residency.use(b)
    assert (a.moves, b.moves) == (["cpu"], ["cpu", "meta"])
    assert (residency.resident_bytes, residency.swapped_bytes, residency.swaps) == (20, 10, 1)


def test_one_that_is_larger_than_the_budget_stays_alone() -> None:
    residency = Residency(GPU, budget=25)
    small, large = Thing(), Thing(30)
    residency.use(small)
    residency.use(large)
    residency.use(large)
    assert (small.moves, large.moves) == (["cpu"], [])
    assert residency.resident_bytes == 30


def test_what_has_grown_is_counted_as_it_is_now() -> None:
    residency = Residency(GPU, budget=25)
    a, b = Thing(), Thing()
    residency.use(a)
    residency.use(b)
    b.nbytes = 20  # e.g. its optimizer was made
    residency.use(a)
    assert (a.moves, b.moves) == ([], ["cpu"])


def test_what_is_dropped_is_forgotten_wherever_it_was() -> None:
    residency = Residency(GPU, budget=15)
    a, b = Thing(), Thing()
    residency.use(a)
    residency.use(b)
    residency.drop(a)
    residency.drop(b)
    assert (residency.resident_bytes, residency.swapped_bytes) == (0, 0)


def test_what_fits_is_said_beforehand() -> None:
    residency = Residency(GPU, budget=25)
    assert residency.fits([]) and residency.fits([Thing(), Thing()])
    assert not residency.fits([Thing(), Thing(), Thing()])
    assert residency.fits([Thing(30)])  # one alone always does
