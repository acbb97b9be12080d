"""The KV of prompts and of ended sequences, for those that begin alike.

A radix tree of tokens for each owner (the weights that computed the KV, and whom for),
all under one token budget. Tensors have the shape [L, 2, K, T, D], as in `kv_cache`.
Nothing here calls the model or knows a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from astuner.engine.embedded.kv_cache import KVLayout
from astuner.types import TokenIds

Owner = tuple[str, str]
"""Whose KV: the name of the weights that computed it, and the tenant it was for."""
NOBODY: Owner = ("", "")
UNUSED_S = 600.0
"""What an owner has not used for so long is forgotten: new weights come with every update,
and nobody says that the old ones are done with."""


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
    """KV by owner and token prefix: every shared prefix is stored once, the least recently
    used ends, whosever they are, go first when more than `budget` tokens are held."""

    def __init__(
        self, layout: KVLayout, budget: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._layout = layout
        self._budget = budget
        self._now = clock
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._roots: dict[Owner, _Node] = {}
        self._used_at: dict[Owner, float] = {}
        self._leaves: set[_Node] = set()
        self._clock = 0
        self.tokens = 0

    def forget(self, weights: str) -> None:
        """Forget what these weights computed, as after a change of them."""
        for owner in [o for o in self._roots if o[0] == weights]:
            self._forget(owner)

    def forget_unused(self) -> None:
        """Forget all of the owners that have not read or kept anything for UNUSED_S."""
        oldest = self._now() - UNUSED_S
        for owner in [o for o, at in self._used_at.items() if at < oldest]:
            self._forget(owner)

    def _forget(self, owner: Owner) -> None:
        del self._used_at[owner]
        nodes = [self._roots.pop(owner)]
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            self._leaves.discard(node)
            self.tokens -= len(node.tokens)

    def takes(self, tokens: TokenIds) -> bool:
        """Whether so many tokens can be held at all."""
        return len(tokens) <= self._budget

    def match(self, tokens: TokenIds, owner: Owner = NOBODY) -> int:
        """How many leading tokens are held."""
        return sum(n for _, n in self._walk(tokens, owner))

    def read(self, tokens: TokenIds, target: Tensor, owner: Owner = NOBODY) -> int:
        """Copy the KV of the longest held prefix into `target` [L, 2, K, >= T, D]; returns
        its length."""
        at = 0
        self._clock += 1
        if owner in self._roots:
            self._used_at[owner] = self._now()
        for node, n in self._walk(tokens, owner):
            target[..., at : at + n, :] = node.kv[..., :n, :]
            node.last_used = self._clock
            at += n
        return at

    def insert(self, tokens: TokenIds, kv: Tensor, owner: Owner = NOBODY) -> None:
        """Keep `kv` [L, 2, K, >= T, D] of these T tokens; what is held already is not
        copied again."""
        self._clock += 1
        node, at = self._roots.get(owner) or self._new_root(owner), 0
        self._used_at[owner] = self._now()
        for node, n in self._walk(tokens, owner):
            at += n
            if n < len(node.tokens):
                node = self._split(node, n)
            node.last_used = self._clock
        if at < len(tokens):
            tail = kv[..., at : len(tokens), :].clone()
            self._attach(_Node(tokens[at:].copy(), tail, node, self._clock))
            self.tokens += len(tokens) - at
        self._evict()

    def _new_root(self, owner: Owner) -> _Node:
        empty = [o for o, root in self._roots.items() if not root.children]
        for other in empty:
            self._forget(other)
        root = _Node(np.zeros(0, np.int32), self._layout.zeros(0), None, 0)
        self._roots[owner] = root
        return root

    def _walk(self, tokens: TokenIds, owner: Owner) -> Iterator[tuple[_Node, int]]:
        """The nodes along `tokens`, each with how many of its tokens agree (>= 1)."""
        node, at = self._roots.get(owner), 0
        while node is not None and at < len(tokens):
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
            if not parent.children and parent.parent is not None:
                self._leaves.add(parent)


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
