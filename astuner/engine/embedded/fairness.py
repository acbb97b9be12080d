"""Who is served next, so that no tenant's many requests or many weights hold up another's.

Places among the running sequences and ticks of the sampler are shared between tenants
first, and then within a tenant. Knows nothing of KV and computes nothing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator

from astuner.engine.embedded.prefix_cache import Owner
from astuner.engine.embedded.requests import Request


class Turns:
    """Under which weights the next tick computes: under all, where they fit. The sequences of
    all tenants that sample under the same weights compute together, whosever turn it is."""

    def __init__(self) -> None:
        self._ticks = 0
        self._of_tenants: dict[str, int] = {}
        self._of_weights: dict[str, int] = {}

    def next(
        self, at_work: Collection[Owner], fits: Callable[[Collection[str]], bool]
    ) -> list[str]:
        """Of the tenant that has waited longest the weights that have, then of the next
        tenant, as long as they fit; whatever the first needs."""
        everything = list(dict.fromkeys(weights for weights, _ in at_work))
        if fits(everything):
            return everything
        self._of_weights = {w: self._of_weights.get(w, self._ticks) for w, _ in at_work}
        self._of_tenants = {t: self._of_tenants.get(t, self._ticks) for _, t in at_work}
        turn, left = list[str](), list(at_work)
        while left:
            tenant = min((t for _, t in left), key=self._of_tenants.__getitem__)
            weights = min((w for w, t in left if t == tenant), key=self._of_weights.__getitem__)
            if turn and not fits([*turn, weights]):
                break
            turn.append(weights)
            left = [owner for owner in left if owner[0] != weights]
            self._ticks += 1
            self._of_weights[weights] = self._of_tenants[tenant] = self._ticks
        return turn


def fair_order(waiting: Iterable[Request], held: Counter[str]) -> Iterator[Request]:
    """The next is always of the tenant that holds the fewest places, by `held` as it is then;
    one tenant's in their own order."""
    queues: dict[str, deque[Request]] = {}
    for request in waiting:
        queues.setdefault(request.tenant, deque()).append(request)
    while queues:
        tenant = min(queues, key=held.__getitem__)
        yield queues[tenant].popleft()
        if not queues[tenant]:
            del queues[tenant]


def beyond_their_share(waiting: Iterable[Request], held: Counter[str], places: int) -> list[str]:
    """The tenants, one for each place that has to be given up, so that those who wait come to
    an equal share of all places. Nobody gives up what nobody else waits for."""
    wanted = Counter(request.tenant for request in waiting)
    share = max(1, places // len(held.keys() | wanted.keys()))
    missing = sum(max(0, min(n, share - held[t])) for t, n in wanted.items())
    missing -= places - held.total()
    left, giving = held.copy(), list[str]()
    while missing > len(giving) and max(left.values(), default=0) > share:
        tenant = max(left, key=left.__getitem__)
        left[tenant] -= 1
        giving.append(tenant)
    return giving
