"""Where keys and values live while sequences are decoded.

`KVPool` keeps the running sequences. A *shelf* holds slots of one length
(64, 128, 192, ... 512, 640, 768, ... tokens); its used slots are always [0, n), so that
decoding reads them as they lie, gathers and copies nothing, and a long sequence does not
stretch the short ones. What no sequence uses is zero. All KV tensors have the shape
[L, 2, ..., K, T, D]: layers, key/value, kv heads, tokens, head size. What ended
sequences leave behind is in `prefix_cache`. Nothing here calls the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from astuner.errors import EngineError

BLOCK = 64
"""Attention counts keys in multiples of this; the shortest slot has so many."""


def whole_blocks(tokens: int) -> int:
    """Rounded up to a multiple of BLOCK."""
    return -(-tokens // BLOCK) * BLOCK


class PoolFull(EngineError):
    """The pool's budget cannot take this sequence now; others have to leave first."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one token's keys and values look like."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def zeros(self, tokens: int, slots: int | None = None) -> Tensor:
        """[L, 2, K, tokens, D], or [L, 2, slots, K, tokens, D]. Zeros, because a masked
        position takes part in decoding with weight 0, and 0 times garbage may be NaN."""
        row = (self.num_kv_heads, tokens, self.head_dim)
        shape = (self.num_layers, 2, *row) if slots is None else (self.num_layers, 2, slots, *row)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(eq=False, slots=True)
class Slot:
    """A running sequence's place. It moves when others leave or when it grows."""

    shelf: Shelf
    index: int
    length: int
    """Tokens whose KV is stored."""

    @property
    def kv(self) -> Tensor:
        """[L, 2, K, S, D] with S >= length: the slot's memory, to read and write."""
        return self.shelf.kv[:, :, self.index]


@dataclass(eq=False, slots=True)
class Shelf:
    """Slots of `size` tokens each; the used ones are [0, len(slots))."""

    size: int
    kv: Tensor
    """[L, 2, capacity, K, size, D]"""
    slots: list[Slot] = field(default_factory=list[Slot])

    @property
    def capacity(self) -> int:
        return self.kv.shape[2]

    @property
    def tokens(self) -> int:
        return self.capacity * self.size


class KVPool:
    """The running sequences' KV, at most `budget` tokens of memory; but always enough for
    one sequence of `max_context` tokens to grow into its last slot."""

    def __init__(self, layout: KVLayout, budget: int, max_context: int) -> None:
        self._layout = layout
        self._budget = max(budget, 2 * _slot_size(max_context))
        self._shelves: dict[int, Shelf] = {}

    def shelves(self) -> list[Shelf]:
        """Those in use, shortest first: their slots in this order are the decode batch."""
        used = [shelf for shelf in self._shelves.values() if shelf.slots]
        return sorted(used, key=lambda shelf: shelf.size)

    def slots(self) -> Iterator[Slot]:
        for shelf in self.shelves():
            yield from shelf.slots

    @property
    def allocated(self) -> int:
        """Tokens of memory held, used or not."""
        return sum(s.tokens for s in self._shelves.values())

    def take(self, length: int) -> Slot:
        """A slot with room for at least one token more than `length`, which it is said
        to hold; the caller fills `slot.kv[..., :length, :]`. Raises PoolFull."""
        shelf = self._shelf_with_room(length + 1)
        slot = Slot(shelf, len(shelf.slots), length)
        shelf.slots.append(slot)
        return slot

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether `take` would succeed for all of these."""
        used = sum(len(s.slots) * s.size for s in self._shelves.values())
        return used + sum(_slot_size(length + 1) for length in lengths) <= self._budget

    def release(self, slot: Slot) -> None:
        """Give the slot back; the shelf's last sequence moves into the hole, with a token that
        is stored but not counted yet."""
        shelf = slot.shelf
        last = shelf.slots.pop()
        _clear(slot)
        if last is not slot:
            _copy(last.kv, slot.kv, last.length + 1)
            _clear(last)
            last.index = slot.index
            shelf.slots[last.index] = last

    def make_room(self, slot: Slot) -> None:
        """Make sure one more token fits; moves the sequence to a longer slot if need be.

        Raises PoolFull, leaving everything as it was.
        """
        if slot.length < slot.shelf.size:
            return
        shelf = self._shelf_with_room(slot.length + 1)
        old = Slot(slot.shelf, slot.index, slot.length)
        old.shelf.slots[old.index] = old  # keeps the old place until the KV is copied
        slot.shelf, slot.index = shelf, len(shelf.slots)
        shelf.slots.append(slot)
        _copy(old.kv, slot.kv, old.length)
        self.release(old)

    def clear(self) -> None:
        self._shelves.clear()

    def _shelf_with_room(self, length: int) -> Shelf:
        size = _slot_size(length)
        shelf = self._shelves.get(size)
        if shelf is None:
            shelf = self._shelves[size] = Shelf(size, self._layout.zeros(size, 0))
        if len(shelf.slots) == shelf.capacity:
            self._widen(shelf)
        return shelf

    def _widen(self, shelf: Shelf) -> None:
        """Double the shelf's capacity where the budget allows it, else take one slot more."""
        if self.allocated + shelf.size > self._budget:
            self._trim()
        spare = (self._budget - self.allocated) // shelf.size
        if spare < 1:
            raise PoolFull(
                f"The KV pool's budget of {self._budget} tokens is used up by "
                f"{sum(len(s.slots) for s in self._shelves.values())} running sequences."
            )
        self._resize(shelf, shelf.capacity + min(spare, max(shelf.capacity, 1)))

    def _trim(self) -> None:
        """Give unused slots back to the system."""
        for shelf in self._shelves.values():
            if len(shelf.slots) < shelf.capacity:
                self._resize(shelf, len(shelf.slots))

    def _resize(self, shelf: Shelf, capacity: int) -> None:
        kv = self._layout.zeros(shelf.size, capacity)
        n = len(shelf.slots)
        kv[:, :, :n] = shelf.kv[:, :, :n]
        shelf.kv = kv


def _slot_size(length: int) -> int:
    """The smallest slot for this many tokens: whole blocks, and above 512 four sizes to a power
    of two."""
    step = max(BLOCK, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step


def _copy(source: Tensor, target: Tensor, length: int) -> None:
    target[..., :length, :] = source[..., :length, :]


def _clear(slot: Slot) -> None:
    """What the sequence has stored, and what a pass that broke off may have; it need not be
    finite, and the next sequence there reads it with weight 0."""
    slot.kv[..., : slot.length + 1, :] = 0
