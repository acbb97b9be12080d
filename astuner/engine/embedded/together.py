"""Several adapters in one forward pass: each token of the packed row gets its own one's term.

An adapter's tokens are gathered, filled up to whole `ROWS`, and multiplied with its matrices
alone: products of the form that one adapter in a pass has, so that on CPU a token's result is
the same to the last bit, and what is not finite in one adapter reaches no other's tokens.
Adapters of one shape with as many rows, and few of them, as in decoding, make one batched
product. Nothing is kept from pass to pass. Knows no layers and no names.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from astuner.engine.embedded.packed import ROWS, whole_rows
from astuner.errors import EngineError

T = TypeVar("T", bound=Hashable)
FEW = 8 * ROWS
"""With more tokens than these a product of its own costs an adapter nothing."""


@dataclass(frozen=True, slots=True)
class Bundle(Generic[T]):
    """Adapters that are multiplied at once, and the tokens of each."""

    adapters: tuple[T, ...]
    """N of them."""
    gather: Tensor
    """[N * M] positions in the packed row, M a multiple of ROWS: each adapter's tokens, filled
    up with the first of them."""
    kept: Tensor
    """[K] which of the N * M are no filling."""
    rows: Tensor
    """[K] positions in the packed row of those."""
    tokens: int
    """Length of the packed row."""


def bundles(
    spans: Iterable[tuple[T | None, int]],
    shape: Callable[[T], Hashable],
    device: torch.device,
) -> Iterator[Bundle[T]]:
    """`spans` are runs of tokens with the adapter of each, or None."""
    found: dict[T, list[NDArray[np.int64]]] = {}
    end = 0
    for adapter, count in spans:
        if adapter is not None:
            found.setdefault(adapter, []).append(np.arange(end, end + count))
        end += count
    rows = {adapter: np.concatenate(parts) for adapter, parts in found.items()}
    alike: dict[Hashable, list[T]] = {}
    for adapter in rows:
        width = whole_rows(len(rows[adapter]))
        alike.setdefault((shape(adapter), width) if width <= FEW else adapter, []).append(adapter)
    for adapters in alike.values():
        yield _bundle(adapters, [rows[a] for a in adapters], whole_rows(end), device)


def _bundle(
    adapters: Sequence[T], rows: Sequence[NDArray[np.int64]], tokens: int, device: torch.device
) -> Bundle[T]:
    width = whole_rows(max(len(r) for r in rows))
    gather = np.stack([np.concatenate([r, np.repeat(r[:1], width - len(r))]) for r in rows])
    kept = np.concatenate([np.arange(len(r)) + i * width for i, r in enumerate(rows)])

    def tensor(numbers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(numbers).to(device)

    return Bundle(
        tuple(adapters), tensor(gather.ravel()), tensor(kept), tensor(np.concatenate(rows)), tokens
    )


@dataclass(frozen=True, slots=True)
class Term(Generic[T]):
    """What a bundle adds to the output of one layer."""

    bundle: Bundle[T]
    a: Sequence[Tensor]
    """N matrices [rank, inputs]."""
    b: Sequence[Tensor]
    """N matrices [outputs, rank]."""
    scale: float

    def add(self, inputs: Tensor, output: Tensor) -> None:
        """Output [..., O] += B (scale * A input [..., I]), of each token's adapter. Raises
        EngineError for a layer that does not get all tokens, or none."""
        x_TI, y_TO = inputs.reshape(-1, inputs.shape[-1]), output.view(-1, output.shape[-1])
        if len(x_TI) == 0:  # no logits are asked for
            return
        if len(x_TI) != self.bundle.tokens:
            raise EngineError(
                f"A layer with an adapter sees {len(x_TI)} of {self.bundle.tokens} tokens: "
                "it cannot tell whose they are."
            )
        x_NMI = x_TI.index_select(0, self.bundle.gather).view(len(self.a), -1, x_TI.shape[-1])
        y_NMO = products(products(x_NMI, self.a).mul_(self.scale), self.b)
        y_TO[self.bundle.rows] += y_NMO.flatten(0, 1).index_select(0, self.bundle.kept)


def products(x_NMI: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Each x [M, I] times the transpose of its matrix [O, I]; [N, M, O]."""
    count, rows, inputs = x_NMI.shape
    shape = (count, rows, inputs, len(matrices[0]))
    if count > 1 and _batched_is_same(shape, x_NMI.dtype, x_NMI.device.type):
        return torch.bmm(x_NMI, torch.stack(tuple(matrices)).transpose(1, 2))
    return torch.stack([F.linear(x, m) for x, m in zip(x_NMI, matrices, strict=True)])


@cache
def _batched_is_same(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> bool:
    """Whether batched products of this shape (N, M, I, O) have the bits of single ones here. On
    most CPUs all but those of rank 1 do; elsewhere no two forms of a product have the same bits
    anyway."""
    if device != "cpu":
        return True
    count, rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, rows, inputs, generator=generator).to(dtype)
    matrices = torch.randn(count, outputs, inputs, generator=generator).to(dtype)
    single = torch.stack([F.linear(r, m) for r, m in zip(x, matrices, strict=True)])
    return torch.equal(torch.bmm(x, matrices.transpose(1, 2)), single)
