"""What stays on the device and what is swapped to host memory, under a budget of bytes.

The least recently used things make way. Whoever computes with a thing calls `use`
first, every time; between two uses it may have been moved. On a CPU there is
nowhere to swap to: moving is free there, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch

HOST = torch.device("cpu")


class Movable(Protocol):
    """Compared by identity."""

    @property
    def nbytes(self) -> int: ...

    def move(self, device: torch.device) -> None: ...


class Residency:
    def __init__(self, device: torch.device, budget: int) -> None:
        self._device = device
        self._budget = budget
        self._resident: dict[Movable, None] = {}  # the least recently used first
        self._swapped: dict[Movable, None] = {}
        self.swaps = 0
        """Times something was brought back."""

    def use(self, thing: Movable) -> None:
        """Make sure it is on the device; others make way. It may exceed the budget alone."""
        if next(reversed(self._resident), None) is thing:
            return
        self._resident.pop(thing, None)
        self._make_room(thing.nbytes)
        if thing in self._swapped:
            del self._swapped[thing]
            thing.move(self._device)
            self.swaps += 1
        self._resident[thing] = None

    def fits(self, things: Collection[Movable]) -> bool:
        """Whether all of them can be on the device at once; one alone always can."""
        return len(things) < 2 or sum(thing.nbytes for thing in things) <= self._budget

    def drop(self, thing: Movable) -> None:
        """Know it no more; its memory is its owner's."""
        self._resident.pop(thing, None)
        self._swapped.pop(thing, None)

    def _make_room(self, nbytes: int) -> None:
        held = self.resident_bytes
        for thing in list(self._resident):
            if held + nbytes <= self._budget:
                return
            held -= thing.nbytes
            thing.move(HOST)
            del self._resident[thing]
            self._swapped[thing] = None

    @property
    def resident_bytes(self) -> int:
        return sum(thing.nbytes for thing in list(self._resident))

    @property
    def swapped_bytes(self) -> int:
        return sum(thing.nbytes for thing in list(self._swapped))
