"""Where keys and values live while sequences are decoded, and after.

`KVPool` keeps the running sequences. A *shelf* holds slots of one length
(64, 128, 256, ... tokens); its used slots are always [0, n), so that decoding
reads a plain strided view, gathers nothing, and a long sequence does not
stretch the short ones. `PrefixCache` keeps the KV of prompts and of ended
sequences in a radix tree under a token budget. All KV tensors have the shape
[L, 2, ..., K, T, D]: layers, key/value, kv heads, tokens, head size. Nothing here
calls the model or knows a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from astuner.errors import EngineError
from astuner.types import TokenIds

BLOCK = 64
"""Views are cut at multiples of this many tokens; the shortest slot has so many."""


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


# ---------------------------------------------------------------- running sequences


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

    @property
    def shelves(self) -> list[Shelf]:
        """Those in use, shortest first: their slots in this order are the decode batch."""
        return [s for _, s in sorted(self._shelves.items()) if s.slots]

    def slots(self) -> Iterator[Slot]:
        for shelf in self.shelves:
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
        """Give the slot back; the shelf's last sequence moves into the hole."""
        shelf = slot.shelf
        last = shelf.slots.pop()
        if last is not slot:
            _copy(last.kv, slot.kv, last.length)
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
    """The smallest slot for this many tokens: a power of two, at least BLOCK."""
    return max(BLOCK, 1 << (length - 1).bit_length())


def _copy(source: Tensor, target: Tensor, length: int) -> None:
    target[..., :length, :] = source[..., :length, :]


# ---------------------------------------------------------------- ended sequences and prompts


@dataclass(eq=False, slots=True)
class _Node:
    """A run of tokens that follows its parent's; children differ in their first token."""

    tokens: TokenIds
    kv: Tensor
    """[L, 2, K, len(tokens), D]"""
    parent: _Node | None
    last_used: int
    children: dict[int, _Node] = field(default_factory=dict[int, "_Node"])


class PrefixCache:
    """KV by token prefix: every shared prefix is stored once, the least recently used
    ends go first when more than `budget` tokens are held."""

    def __init__(self, layout: KVLayout, budget: int) -> None:
        self._layout = layout
        self._budget = budget
        self.clear()

    def clear(self) -> None:
        """Forget everything, as after a change of weights."""
        self._root = _Node(np.zeros(0, np.int32), self._layout.zeros(0), None, 0)
        self._leaves: set[_Node] = set()
        self._clock = 0
        self.tokens = 0

    def takes(self, tokens: TokenIds) -> bool:
        """Whether so many tokens can be held at all."""
        return len(tokens) <= self._budget

    def match(self, tokens: TokenIds) -> int:
        """How many leading tokens are held."""
        return sum(n for _, n in self._walk(tokens))

    def read(self, tokens: TokenIds, target: Tensor) -> int:
        """Copy the KV of the longest held prefix into `target` [L, 2, K, >= T, D]; returns
        its length."""
        at = 0
        self._clock += 1
        for node, n in self._walk(tokens):
            target[..., at : at + n, :] = node.kv[..., :n, :]
            node.last_used = self._clock
            at += n
        return at

    def insert(self, tokens: TokenIds, kv: Tensor) -> None:
        """Keep `kv` [L, 2, K, >= T, D] of these T tokens; what is held already is not
        copied again."""
        self._clock += 1
        node, at = self._root, 0
        for node, n in self._walk(tokens):
            at += n
            if n < len(node.tokens):
                node = self._split(node, n)
            node.last_used = self._clock
        if at < len(tokens):
            tail = kv[..., at : len(tokens), :].clone()
            self._attach(_Node(tokens[at:].copy(), tail, node, self._clock))
            self.tokens += len(tokens) - at
        self._evict()

    def _walk(self, tokens: TokenIds) -> Iterator[tuple[_Node, int]]:
        """The nodes along `tokens`, each with how many of its tokens agree (>= 1)."""
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                return
            n = common_prefix(child.tokens, tokens[at:])
            whole = n == len(child.tokens)  # asked now: the caller may split the node
            yield child, n
            if not whole:
                return
            node, at = child, at + n

    def _attach(self, node: _Node) -> None:
        assert node.parent is not None
        node.parent.children[int(node.tokens[0])] = node
        self._leaves.discard(node.parent)
        if not node.children:
            self._leaves.add(node)

    def _split(self, node: _Node, n: int) -> _Node:
        """Cut `node` after n tokens; returns the new upper half. Both halves own their
        memory, so that evicting the lower one frees it."""
        upper = _Node(node.tokens[:n], node.kv[..., :n, :].clone(), node.parent, node.last_used)
        node.tokens, node.kv, node.parent = node.tokens[n:], node.kv[..., n:, :].clone(), upper
        self._attach(upper)
        self._attach(node)
        return upper

    def _evict(self) -> None:
        while self.tokens > self._budget:
            leaf = min(self._leaves, key=lambda node: node.last_used)
            self._leaves.remove(leaf)
            self.tokens -= len(leaf.tokens)
            parent = leaf.parent
            assert parent is not None
            del parent.children[int(leaf.tokens[0])]
            if not parent.children and parent is not self._root:
                self._leaves.add(parent)


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
