"""Log-probabilities of chosen tokens, with a gradient and in bounded memory.

A float32 softmax over the whole vocabulary is several times larger than the logits
themselves; here it exists for some rows at a time, forward and backward, so few that
they stay in a CPU's cache.
Several tokens may be read from one row of logits (repeats that part ways there).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 21
"""Float32 numbers of one chunk: 8 MiB."""


def token_logprobs(
    logits_RV: Tensor, rows_N: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at (rows_N, targets_N), float32 [N], and the
    entropy of each row in nats, float32 [R], without a gradient. The backward pass writes the
    logits' gradient over them: they are a large part of its memory."""
    return _TokenLogprobs.apply(logits_RV, rows_N, targets_N, temperature)  # pyright: ignore


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_RV: Tensor, rows_N: Tensor, targets_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        normalisers: list[Tensor] = []
        entropies: list[Tensor] = []
        for chunk in _chunks(logits_RV):
            normaliser, entropy = _normalise(chunk, temperature)
            normalisers.append(normaliser)
            entropies.append(entropy)
        normaliser_R = torch.cat(normalisers)
        ctx.save_for_backward(logits_RV, rows_N, targets_N)
        ctx.temperature = temperature
        chosen_N = logits_RV[rows_N, targets_N].float() / temperature
        entropy_R = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy_R)
        return chosen_N - normaliser_R[rows_N], entropy_R

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None, None]:
        """d logprob / d logits = (one-hot - softmax) / temperature."""
        logits_RV, rows_N, targets_N = ctx.saved_tensors
        gradient_N = grads[0] / ctx.temperature
        total_R1 = gradient_N.new_zeros(len(logits_RV), 1)
        total_R1.index_add_(0, rows_N, gradient_N[:, None])
        out_RV = logits_RV.detach()
        chunks = _chunks(out_RV)
        for chunk, total in zip(chunks, total_R1.split(len(chunks[0])), strict=True):
            chunk.copy_(_scaled(chunk, ctx.temperature).softmax(-1).mul_(-total))
        out_RV.index_put_((rows_N, targets_N), gradient_N.to(out_RV.dtype), accumulate=True)
        return out_RV, None, None, None


def _normalise(logits_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log sum exp and entropy of each row, read off the softmax that sampling uses: another
    way to sum up a large vocabulary differs by 1e-5."""
    scaled = _scaled(logits_RV, temperature)
    probs = scaled.softmax(-1)
    log_top = probs.amax(-1).log()
    top = scaled.amax(-1)
    scaled.sub_(top[:, None]).clamp_(min=-1e30)  # 0 * -inf of an impossible token is not 0
    return top - log_top, -log_top - probs.mul_(scaled).sum(-1)


def _scaled(logits_RV: Tensor, temperature: float) -> Tensor:
    """Float32, in memory of its own."""
    scaled = logits_RV.to(torch.float32, copy=True)
    return scaled if temperature == 1 else scaled.div_(temperature)


def _chunks(rows_RV: Tensor) -> tuple[Tensor, ...]:
    return rows_RV.split(max(1, CHUNK_ELEMENTS // rows_RV.shape[-1]))
