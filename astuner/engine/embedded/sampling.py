"""Logits to tokens: one draw a row, with the logprob of the distribution drawn from.

A row's draw depends on its logits, its parameters, its seed and its position in
the completion alone, never on the other rows. The draw is the inverse of the
cumulative distribution at one uniform number, in float32: over a large
vocabulary far cheaper than Gumbel noise. Knows no sequences and no stop tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from astuner.engine.protocol import SamplingParams

NUCLEUS = 512
"""Truncation looks at so many most probable tokens first, and sorts the whole vocabulary
only for the rows that need more. A fixed number: with another one ties might fall
differently, and a row's draw would depend on its batch."""
_MIN_TEMPERATURE = 1e-4


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row asks for."""

    params: SamplingParams
    seed: int
    position: int
    """How many tokens of the completion were drawn before."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token a row, on the host."""

    tokens: list[int]
    logprobs: list[float]
    """Of the tempered and truncated distribution; of the untempered one where greedy."""
    top: list[dict[int, float]]
    """The most probable alternatives of each row, as many as it asked for."""


def sample(logits_NV: Tensor, draws: Sequence[Draw]) -> Drawn:
    """Draw a token for each row. `logits_NV` may have any float dtype and more rows than
    there are draws. A logprob of NaN says that the row's logits were not finite."""
    params = [draw.params for draw in draws]
    probs_NV = _probabilities(logits_NV[: len(draws)], params)
    uniform_N = torch.from_numpy(uniforms(draws)).to(probs_NV.device)
    truncated = [i for i, p in enumerate(params) if p.temperature > 0 and _truncates(p)]
    if truncated:
        rows = torch.tensor(truncated, device=probs_NV.device)
        probs_NV[rows] = _truncate(probs_NV[rows], [params[i] for i in truncated])
    tokens_N = _inverse_cdf(probs_NV, uniform_N)
    greedy = [i for i, p in enumerate(params) if p.temperature == 0]
    if greedy:
        rows = torch.tensor(greedy, device=probs_NV.device)
        tokens_N[rows] = logits_NV[rows].argmax(-1)
    logprobs_N = probs_NV.gather(1, tokens_N[:, None])[:, 0].log()
    tokens, logprobs = _to_host(tokens_N, logprobs_N)
    return Drawn(tokens.tolist(), logprobs.tolist(), _top(probs_NV, params))


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


def _inverse_cdf(probs_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds u. Its own probability is
    never 0: u is scaled by the total as summed and kept below it."""
    cdf_NV = probs_NV.cumsum(-1)
    if cdf_NV.device.type != "cpu":  # a parallel sum may go down by a rounding error
        cdf_NV = cdf_NV.cummax(-1).values
    total_N = cdf_NV[:, -1]
    target_N = torch.minimum(uniform_N * total_N, total_N * (1 - 2.0**-23))
    tokens_N = torch.searchsorted(cdf_NV, target_N[:, None], right=True)[:, 0]
    return tokens_N.clamp_(max=probs_NV.shape[1] - 1)  # out of range only where NaN


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


def _top(probs_NV: Tensor, params: Sequence[SamplingParams]) -> list[dict[int, float]]:
    top: list[dict[int, float]] = [{} for _ in params]
    asked = [i for i, p in enumerate(params) if p.top_logprobs > 0]
    if not asked:
        return top
    rows = torch.tensor(asked, device=probs_NV.device)
    width = min(probs_NV.shape[1], max(params[i].top_logprobs for i in asked))
    values, tokens = probs_NV[rows].topk(width, dim=-1)
    ids, logprobs = _to_host(tokens, values.log())
    for row, token_row, logprob_row in zip(asked, ids.tolist(), logprobs.tolist(), strict=True):
        pairs = list(zip(token_row, logprob_row, strict=True))[: params[row].top_logprobs]
        top[row] = {token: logprob for token, logprob in pairs if logprob > float("-inf")}
    return top
