"""From what the client asks and what the session allows to how a reply is drawn.

Training rollouts override the client's temperature, top_p, top_k and seed;
lengths are cut to what the session, the context and the sample have room for.
Pure functions; nothing is sampled here.
"""

from __future__ import annotations

from dataclasses import dataclass

from astuner.engine.protocol import SamplingParams
from astuner.errors import RequestError
from astuner.model_tuner.session import AgentKey, SessionSpec
from astuner.model_tuner.wire import SamplingFields


@dataclass(frozen=True, slots=True)
class Draw:
    """Everything about drawing a reply but the seed."""

    temperature: float
    top_p: float
    top_k: int
    overridden: bool
    """The client asked for something else, and did not get it."""
    seed: int | None
    """The client's own, where it counts."""


def resolve(asked: SamplingFields, spec: SessionSpec) -> Draw:
    """Whose temperature, top_p, top_k and seed are used."""
    ours = spec.sampling
    top_k = None if asked.top_k is None else max(0, asked.top_k)
    theirs = (asked.temperature, asked.top_p, top_k)
    defaults = (ours.temperature, ours.top_p, ours.top_k)
    if not ours.override:
        chosen = [d if t is None else t for t, d in zip(theirs, defaults, strict=True)]
        return Draw(float(chosen[0]), float(chosen[1]), int(chosen[2]), False, asked.seed)
    # A fixed seed would make the episodes of a group repeat each other.
    differs = any(t is not None and t != d for t, d in zip(theirs, defaults, strict=True))
    return Draw(*defaults, differs or asked.seed is not None, None)


def max_tokens(asked: int | None, agent: AgentKey, prompt_tokens: int, max_context: int) -> int:
    """The longest reply there is room for. Raises RequestError when there is none."""
    spec = agent.session.spec
    first = spec.max_prompt_tokens
    if first is not None and agent.calls_recorded == 0 and prompt_tokens > first:
        raise _too_long(prompt_tokens, first, "data.max_prompt_length")
    # Who only asks a served model knows no configuration, and cannot change it.
    limits = [(max_context, "rollout.max_model_len" if spec.record else None)]
    if spec.max_total_tokens is not None:
        limits.append((spec.max_total_tokens, "data.max_prompt_length + max_response_length"))
    limit, key = min(limits, key=lambda known: known[0])
    if prompt_tokens >= limit:
        raise _too_long(prompt_tokens, limit, key)
    return min(asked or spec.sampling.max_tokens, spec.sampling.max_tokens, limit - prompt_tokens)


def params(draw: Draw, length: int, stop_token_ids: tuple[int, ...], top: int) -> SamplingParams:
    """`draw` as the engine wants it; the seed is put in for each choice."""
    return SamplingParams(
        max_tokens=length,
        temperature=draw.temperature,
        top_p=draw.top_p,
        top_k=draw.top_k,
        stop_token_ids=stop_token_ids,
        top_logprobs=top,
    )


def _too_long(prompt_tokens: int, limit: int, key: str | None) -> RequestError:
    """`key` is the configuration's name for the limit; None where that is nobody's business."""
    way_out = f" ({key}). Shorten the messages, or raise the limit." if key else (
        ", the model's context. Shorten the messages."
    )  # fmt: skip
    return RequestError(
        f"The prompt has {prompt_tokens} tokens, but the limit is {limit} tokens{way_out}",
        code="context_length_exceeded",
        param="messages",
    )
