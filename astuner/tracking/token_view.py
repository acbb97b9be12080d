"""A sample's tokens in colour: what is trained, how likely it was, what is context.

For the debug backbone and for people who want to see what the loss sees. It only
paints; what a token's mask means is `context_tracker`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from astuner.types import Sample

CONTEXT = "grey50"
NOT_TRAINED = "italic magenta"
SHADES = (
    (0.0, "black on #ff8a80"),
    (0.1, "black on #ffd180"),
    (0.5, "black on #e6ee9c"),
    (0.9, "black on #a5d6a7"),
)
"""Background of a trained token, by the least probability it was sampled with."""
NAMES = ("p < 0.1", "p < 0.5", "p < 0.9", "p >= 0.9")


def colored_tokens(
    sample: Sample, decode: Callable[[Sequence[int]], str], *, logprobs: bool = False
) -> Text:
    """The sample's text: trained tokens on a background shaded by their probability,
    sampled but untrained ones in italics, context in grey. `logprobs` writes each trained
    token's logprob behind it."""
    text = Text(overflow="fold")
    sampled_T = sample.turns >= 0
    for start, end in _pieces(sample.token_ids.tolist(), decode):
        style = _style(sample, sampled_T, start)
        text.append(_visible(decode(sample.token_ids[start:end].tolist())), style)
        if logprobs and sample.loss_mask[start]:
            text.append(f"{sample.logprobs[start:end].sum():.2f} ", "dim")
    return text


def legend() -> Text:
    """What the colours mean, in one line."""
    text = Text.assemble(
        ("context", CONTEXT), "  ", ("sampled, not trained", NOT_TRAINED), "  trained: "
    )
    for (_, style), name in zip(SHADES, NAMES, strict=True):
        text.append(f" {name} ", style)
        text.append(" ")
    return text


def _style(sample: Sample, sampled_T: NDArray[np.bool_], position: int) -> str:
    if sample.loss_mask[position]:
        probability = math.exp(float(sample.logprobs[position]))
        return [style for least, style in SHADES if probability >= least][-1]
    return NOT_TRAINED if sampled_T[position] else CONTEXT


def _pieces(
    ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> Iterator[tuple[int, int]]:
    """Runs of tokens that decode to whole characters: mostly one token each."""
    start = 0
    for end in range(1, len(ids) + 1):
        whole = not decode(ids[start:end]).endswith("\ufffd")
        if whole or end - start >= 8 or end == len(ids):
            yield start, end
            start = end


def _visible(text: str) -> str:
    """Line ends shown, so that a trained newline is not overlooked."""
    return text.replace("\n", "\u23ce\n")
