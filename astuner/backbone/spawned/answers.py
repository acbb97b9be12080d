"""A whole answer of a trainer's inference engine as the chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence

from astuner.engine.protocol import SamplingParams, TokenChunk
from astuner.types import FinishReason


def chunks(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    params: SamplingParams,
    limit: int,
    *,
    oldest: int,
    newest: int,
    cached: int = 0,
) -> list[TokenChunk]:
    """Of an answer of at most `limit` tokens, `cached` of whose prompt were not computed anew.

    `oldest` and `newest` are the weights it was sampled with. Where they differ nobody tells at
    which token: the last one is of the newest, all before count as of the oldest."""
    ids, scores = tuple(token_ids), tuple(logprobs)
    top = tuple({i: p} for i, p in zip(ids, scores, strict=True)) if params.top_logprobs else ()
    finish = finish_reason(ids, params, limit)
    if oldest == newest or len(ids) < 2:
        return [TokenChunk(ids, scores, newest, finish, top, cached)]
    return [
        TokenChunk(ids[:-1], scores[:-1], oldest, None, top[:-1], cached),
        TokenChunk(ids[-1:], scores[-1:], newest, finish, top[-1:]),
    ]


def finish_reason(ids: Sequence[int], params: SamplingParams, limit: int) -> FinishReason:
    """Such engines say the same of an answer that stopped and of one that was cut."""
    return "length" if len(ids) >= limit and ids[-1] not in params.stop_token_ids else "stop"
