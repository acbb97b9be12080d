"""Logits to tokens, with the logprobs of the distributions drawn from.

A draw depends on its row of logits, its parameters, its seed and its position in the
completion alone, never on the other draws. It is the inverse of the
cumulative distribution at one uniform number, in float32: over a large
vocabulary far cheaper than Gumbel noise. Knows no sequences and no stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from astuner.engine.protocol import SamplingParams

NUCLEUS = 512
"""Truncation looks at so many most probable tokens first, and sorts the whole vocabulary
only for the rows that need more. A fixed number: with another one ties might fall
differently, and a row's draw would depend on its batch."""
CHUNK_ELEMENTS = 1 << 21
"""Float32 numbers of one chunk of distributions on CPU: 8 MiB, which stay in its cache."""
PART = 128
"""Tokens whose probabilities are added up before any of them is looked at. Most vocabularies
have a multiple of it, and need no filling."""
_MIN_TEMPERATURE = 1e-4


@dataclass(frozen=True, slots=True)
class Draw:
    """What one sequence asks for."""

    params: SamplingParams
    seed: int
    position: int
    """How many tokens of the completion were drawn before."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token a draw, on the host."""

    tokens: list[int]
    logprobs: list[float]
    """Of the tempered and truncated distribution; of the untempered one where greedy."""
    top: list[dict[int, float]]
    """The most probable alternatives of each draw, as many as it asked for."""


@dataclass(frozen=True, slots=True)
class _Distribution:
    """What one or several draws are drawn from."""

    row: int
    params: SamplingParams
    draws: list[int]


def sample(logits_NV: Tensor, draws: Sequence[Draw], rows: Sequence[int] | None = None) -> Drawn:
    """One token for each draw, from its row of `logits_NV`, of any float dtype: those of `rows`,
    where several may share one, else the first ones in order. A logprob of NaN says that the
    row's logits were not finite."""
    count = len(draws)
    drawn = Drawn([0] * count, [0.0] * count, [{} for _ in draws])
    every = _distributions(draws, range(count) if rows is None else rows)
    uniform_N = uniforms(draws)
    vocab, on_cpu = logits_NV.shape[1], logits_NV.device.type == "cpu"
    size = max(1, CHUNK_ELEMENTS // vocab if on_cpu else count)
    for start in range(0, len(every), size):
        _draw(logits_NV, every[start : start + size], uniform_N, draws, drawn)
    return drawn


def _distributions(draws: Sequence[Draw], rows: Sequence[int]) -> list[_Distribution]:
    found: dict[tuple[int, float, float, int], _Distribution] = {}
    for number, (draw, row) in enumerate(zip(draws, rows, strict=True)):
        p = draw.params
        kind = row, p.temperature, p.top_p, p.top_k
        found.setdefault(kind, _Distribution(row, p, [])).draws.append(number)
    return list(found.values())


def _draw(
    logits_NV: Tensor,
    chunk: Sequence[_Distribution],
    uniform_N: NDArray[np.float32],
    draws: Sequence[Draw],
    drawn: Drawn,
) -> None:
    """The draws of these distributions, into `drawn`. `_K`: distributions; `_J`: draws of one,
    filled up with void ones."""
    params = [d.params for d in chunk]
    logits_KV = logits_NV[_index([d.row for d in chunk])]
    probs_KV = _probabilities(logits_KV, params)
    device = probs_KV.device
    truncated = [k for k, p in enumerate(params) if p.temperature > 0 and _truncates(p)]
    if truncated:
        some = torch.tensor(truncated, device=device)
        probs_KV[some] = _truncate(probs_KV[some], [params[k] for k in truncated])
    uniform_KJ = np.zeros((len(chunk), max(len(d.draws) for d in chunk)), np.float32)
    for k, d in enumerate(chunk):
        uniform_KJ[k, : len(d.draws)] = uniform_N[d.draws]
    tokens_KJ = _inverse_cdf(probs_KV, torch.from_numpy(uniform_KJ).to(device))
    greedy = [k for k, p in enumerate(params) if p.temperature == 0]
    if greedy:
        some = torch.tensor(greedy, device=device)
        tokens_KJ[some] = logits_KV[some].argmax(-1, keepdim=True)
    tokens, logprobs = _to_host(tokens_KJ, probs_KV.gather(1, tokens_KJ).log())
    top = _top(probs_KV, [max(draws[i].params.top_logprobs for i in d.draws) for d in chunk])
    for d, row, values, pairs in zip(chunk, tokens.tolist(), logprobs.tolist(), top, strict=True):
        for number, token, logprob in zip(d.draws, row, values, strict=False):
            drawn.tokens[number], drawn.logprobs[number] = token, logprob
            drawn.top[number] = dict(pairs[: draws[number].params.top_logprobs])


def _index(rows: list[int]) -> slice | list[int]:
    """A slice where they follow each other: nothing is copied then."""
    follow = rows == list(range(rows[0], rows[0] + len(rows)))
    return slice(rows[0], rows[-1] + 1) if follow else rows


def uniforms(draws: Sequence[Draw]) -> NDArray[np.float32]:
    """[N] in [0, 1), one for each (seed, position): two rounds of SplitMix64 (Steele et al.
    2014), a counter-based generator, so that no state is kept."""
    seeds = np.array([draw.seed & 0xFFFFFFFFFFFFFFFF for draw in draws], np.uint64)
    positions = np.array([draw.position for draw in draws], np.uint64)
    bits = _splitmix(_splitmix(seeds) + positions)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _truncates(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k > 0


def _probabilities(logits_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Tempered softmax in float32; greedy rows are left untempered."""
    scaled_NV = logits_NV.float()
    if any(p.temperature not in (0, 1) for p in params):
        temperature_N = [
            max(p.temperature, _MIN_TEMPERATURE) if p.temperature else 1 for p in params
        ]
        scaled_NV = scaled_NV / torch.tensor(temperature_N, device=scaled_NV.device)[:, None]
    return scaled_NV.softmax(-1)


def _inverse_cdf(probs_KV: Tensor, uniform_KJ: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds u, [K, J]; its own is never 0. Found
    by parts of the vocabulary, then in one of them: a running sum over all takes far longer
    than sums of parts do."""
    whole_KV = F.pad(probs_KV, (0, missing)) if (missing := -probs_KV.shape[1] % PART) else probs_KV
    parts_KPW = whole_KV.unflatten(1, (-1, PART))
    cdf_K1P = _running_sum(parts_KPW.sum(-1)[:, None])
    part_K1J, rest_K1J = _first_beyond(cdf_K1P, uniform_KJ[:, None] * cdf_K1P[..., -1:])
    part_KJ1, rest_KJ1 = part_K1J.mT, rest_K1J.mT
    cdf_KJW = _running_sum(parts_KPW.gather(1, part_KJ1.expand(-1, -1, PART)))
    within_KJ1, _ = _first_beyond(cdf_KJW, rest_KJ1)
    tokens_KJ = (part_KJ1 * PART + within_KJ1)[..., 0]
    return tokens_KJ.clamp_(max=probs_KV.shape[1] - 1)  # out of range only where NaN


def _running_sum(x: Tensor) -> Tensor:
    cdf = x.cumsum(-1)
    # a parallel sum may go down by a rounding error
    return cdf if cdf.device.type == "cpu" else cdf.cummax(-1).values


def _first_beyond(cdf: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where `cdf` [..., W] first exceeds each target [..., J], which is kept below its end, and
    how far the target lies beyond the place before."""
    end = cdf[..., -1:]
    target = torch.minimum(target, end * (1 - 2.0**-23))
    place = torch.searchsorted(cdf, target.contiguous(), right=True)
    place = place.clamp_(max=cdf.shape[-1] - 1)  # out of range only where NaN
    before = cdf.gather(-1, (place - 1).clamp_(min=0)).masked_fill_(place == 0, 0.0)
    return place, target - before


def _truncate(probs_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keep the top_k most probable tokens, of these the smallest set that holds top_p of
    their mass (Holtzman et al. 2019), and renormalise. Ties fall to sort order."""
    vocab, device = probs_NV.shape[1], probs_NV.device
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    k_N = torch.tensor(top_k, device=device)
    p_N = torch.tensor([p.top_p for p in params], device=device)
    result_NV, enough_N = _keep_top(probs_NV, k_N, p_N, min(vocab, NUCLEUS))
    missing = torch.nonzero(~enough_N)[:, 0]
    if len(missing):
        full, _ = _keep_top(probs_NV[missing], k_N[missing], p_N[missing], vocab)
        result_NV[missing] = full
    return result_NV


def _keep_top(probs_NV: Tensor, k_N: Tensor, p_N: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Truncate looking at the `width` most probable tokens only; also whether a row's kept
    set lies within them."""
    sorted_NW, order_NW = probs_NV.topk(width, dim=-1)
    rank_W = torch.arange(width, device=probs_NV.device)
    sorted_NW = sorted_NW.masked_fill(rank_W >= k_N[:, None], 0.0)
    cdf_NW = sorted_NW.cumsum(-1)
    whole_N = k_N <= width
    nucleus_N = p_N * torch.where(whole_N, cdf_NW[:, -1], probs_NV.sum(-1))
    before_NW = cdf_NW - sorted_NW
    inside_NW = (before_NW < nucleus_N[:, None]) | (p_N[:, None] >= 1) | (rank_W == 0)
    kept_NW = sorted_NW * inside_NW
    enough_N = whole_N | (cdf_NW[:, -1] >= nucleus_N)
    kept_NW = kept_NW / kept_NW.sum(-1, keepdim=True)
    return torch.zeros_like(probs_NV).scatter_(1, order_NW, kept_NW), enough_N


def _to_host(tokens_N: Tensor, logprobs_N: Tensor) -> tuple[Tensor, Tensor]:
    """Both arrays in one transfer."""
    packed = torch.stack([tokens_N.int(), logprobs_N.float().view(torch.int32)]).cpu()
    return packed[0], packed[1].view(torch.float32)


def _top(probs_KV: Tensor, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    """The most probable tokens of each distribution with their logprobs, as many as given."""
    top: list[list[tuple[int, float]]] = [[] for _ in counts]
    asked = [k for k, count in enumerate(counts) if count > 0]
    if not asked:
        return top
    rows = torch.tensor(asked, device=probs_KV.device)
    values, tokens = probs_KV[rows].topk(min(probs_KV.shape[1], max(counts)), dim=-1)
    ids, logprobs = _to_host(tokens, values.log())
    for k, token_row, logprob_row in zip(asked, ids.tolist(), logprobs.tolist(), strict=True):
        pairs = list(zip(token_row, logprob_row, strict=True))[: counts[k]]
        top[k] = [(token, logprob) for token, logprob in pairs if logprob > float("-inf")]
    return top
