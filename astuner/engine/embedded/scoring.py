"""The logprobs of given tokens: a prefill that keeps its logits.

In pieces, so that neither the logits nor the time between two ticks of the sampler
grow with the length. On CPU the logprobs are bitwise those that sampling reports.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from astuner.engine.embedded.device_thread import Steps
from astuner.engine.embedded.kv_cache import whole_blocks
from astuner.engine.embedded.plans import Segment
from astuner.engine.embedded.steps import SamplingWeights, kv_layout, prefill
from astuner.engine.protocol import Scores
from astuner.types import TokenIds

PIECE = 512
"""Tokens of one pass: a vocabulary of 150,000 makes 300 MB of float32 logits of them."""


def score(weights: SamplingWeights, name: str, tokens: TokenIds, top_k: int) -> Steps[Scores]:
    """Scores [T] of `tokens` under the weights `name`; yields between two pieces."""
    kv = kv_layout(weights).zeros(whole_blocks(len(tokens)))
    logprobs = np.full(len(tokens), np.nan, np.float32)
    top: list[dict[int, float]] = [{}]
    inputs = tokens[:-1]
    for start in range(0, len(inputs), PIECE):
        piece = inputs[start : start + PIECE]
        segment = Segment(kv, start, len(piece))
        with torch.inference_mode():
            logits_TV = prefill(weights, [name], [segment], [piece], logits=True)
            targets = tokens[start + 1 : start + 1 + len(piece)]
            logprobs[start + 1 : start + 1 + len(piece)], best = _read(
                logits_TV[: len(piece)], targets, top_k
            )
        top += best
        yield
    return Scores(logprobs, tuple(top) if top_k else ())


def _read(
    logits_TV: Tensor, targets: TokenIds, top_k: int
) -> tuple[NDArray[np.float32], list[dict[int, float]]]:
    """The logprob of each target, and the most probable ids of each row."""
    probs_TV = logits_TV.float().softmax(-1)
    targets_T = torch.from_numpy(targets.astype(np.int64)).to(probs_TV.device)
    chosen_T = probs_TV.gather(1, targets_T[:, None])[:, 0].log()
    best: list[dict[int, float]] = []
    if top_k:
        values, ids = probs_TV.topk(min(top_k, probs_TV.shape[1]), dim=-1)
        pairs = zip(ids.tolist(), values.log().tolist(), strict=True)
        best = [dict(zip(*pair, strict=True)) for pair in pairs]
    return chosen_T.cpu().numpy(), best
