"""The running requests, and the slots that hold their KV.

Requests whose tokens are the same, of one owner, share a slot: the repeats of a prompt
are one row of the decode batch until what they draw parts them, and those that go on
drawing alike stay together. That changes no request's result. Decides nobody's turn and
calls no model.
"""

from __future__ import annotations

from collections.abc import Iterator

from astuner.engine.embedded.kv_cache import KVPool, Slot
from astuner.engine.embedded.prefix_cache import Owner
from astuner.engine.embedded.requests import Request
from astuner.types import TokenIds

_Key = tuple[Owner, int, bytes]


class Running:
    """Requests, in order of admission. All of a slot have been fed the same tokens, which are
    those it stores; the one that each is fed next may differ until `make_room`."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._slots: dict[Request, Slot] = {}
        self._sharing: dict[Slot, list[Request]] = {}
        self._new: dict[_Key, Slot] = {}
        """Slots of which nothing has been decoded yet."""
        self._parted: dict[tuple[Slot, int], Slot] = {}
        """Where requests of a slot have gone, by the token that they drew."""

    def __iter__(self) -> Iterator[Request]:
        return iter(self._slots)

    def __reversed__(self) -> Iterator[Request]:
        return reversed(self._slots)

    def __contains__(self, request: Request) -> bool:
        return request in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def rows(self) -> list[tuple[Slot, tuple[Request, ...]]]:
        """The decode batch: the pool's slots in their order, with the requests of each."""
        return [(slot, tuple(self._sharing[slot])) for slot in self._pool.slots()]

    def slot_of(self, request: Request) -> Slot:
        return self._slots[request]

    def sharing_with(self, request: Request) -> list[Request]:
        """All of its slot, itself too; nobody where it does not run."""
        return list(self._sharing[self._slots[request]]) if request in self._slots else []

    def to_be_parted(self) -> list[int]:
        """Lengths of the slots that are needed once all requests that share one go on apart."""
        return [
            slot.length for slot, requests in self._sharing.items() for _ in range(1, len(requests))
        ]

    # ------------------------------------------------------------ coming

    def join(self, request: Request, fed: TokenIds) -> bool:
        """Share the slot of one that has the same tokens and came since the last decoding."""
        slot = self._new.get(_key(request, fed))
        if slot is None or slot not in self._sharing:
            return False
        self._sharing[slot].append(request)
        self._slots[request] = slot
        return True

    def place(self, request: Request, fed: TokenIds) -> Slot:
        """A slot of its own, in which the caller stores the KV of the tokens `fed`. Raises
        PoolFull."""
        slot = self._pool.take(len(fed))
        self._sharing[slot] = [request]
        self._slots[request] = slot
        self._new[_key(request, fed)] = slot
        return slot

    # ------------------------------------------------------------ decoding

    def begin(self) -> None:
        """A token of each is fed next, which `make_room` has to be called for in order."""
        self._new.clear()
        self._parted.clear()

    def make_room(self, request: Request) -> None:
        """Room for its next token, in a slot whose other requests are fed the same. Raises
        PoolFull, leaving everything as it was."""
        slot = self._slots[request]
        if self._sharing[slot][0].last_token != request.last_token:
            slot = self._part(request, slot)  # and there is room
        self._pool.make_room(slot)

    def _part(self, request: Request, slot: Slot) -> Slot:
        """Into the slot of those that drew the same token; the first of them takes it."""
        drawn = slot, request.last_token
        known = self._parted.get(drawn)
        if known is not None and known not in self._sharing:
            known = None
        there = known or self._pool.take(slot.length)
        self._parted[drawn] = there
        self._sharing[slot].remove(request)
        self._sharing.setdefault(there, []).append(request)
        self._slots[request] = there
        if known is None:
            there.kv[..., : slot.length, :] = slot.kv[..., : slot.length, :]
        return there

    # ------------------------------------------------------------ going

    def remove(self, request: Request) -> None:
        """Its slot is free once nobody shares it any more."""
        slot = self._slots.pop(request)
        sharing = self._sharing[slot]
        sharing.remove(request)
        if not sharing:
            del self._sharing[slot]
            self._pool.release(slot)

    def clear(self) -> None:
        """Forget all requests and all of the pool."""
        self._pool.clear()
        for mapping in (self._slots, self._sharing, self._new, self._parted):
            mapping.clear()


def _key(request: Request, fed: TokenIds) -> _Key:
    return request.owner, request.kv_version, fed.tobytes()
