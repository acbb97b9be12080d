"""OpenAI's request and error JSON: what a client may ask for, and how it is refused.

The other dialects have requests of their own (`dialects/`), parsed by the same rules.

A field that would change the sampled distribution is honoured or refused with a
400 that names it, never ignored. Fields that only label or route a request are
accepted. Any model name is accepted too: the key says who is asking, and
frameworks look names up in tables of their own. Nothing here samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from astuner.errors import (
    AstunerError,
    ContextLengthError,
    DeadlineExceeded,
    EngineClosed,
    EngineError,
    RequestError,
)

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
    }
)
"""Accepted and recorded, but without effect on what is sampled."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
}
"""Accepted with these values only, which change nothing."""

WAY_OUT: Mapping[str, str] = {
    "presence_penalty": "Penalties change the distribution that is trained; leave it out or 0.",
    "frequency_penalty": "Penalties change the distribution that is trained; leave it out or 0.",
    "repetition_penalty": "Penalties change the distribution that is trained; leave it out or 1.",
    "logit_bias": "A bias changes the distribution that is trained; leave it out.",
    "response_format": "Decoding is not constrained: ask for JSON in the prompt, or use tools.",
    "functions": "Use `tools`.",
    "function_call": "Use `tool_choice`.",
    "reasoning_effort": "Set model.template_kwargs in the configuration.",
    "chat_template_kwargs": "Set model.template_kwargs in the configuration.",
    "best_of": "Use `n`.",
}


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


StopString = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: every chunk of a chat answer tells the usage so far."""


class Asked(BaseModel):
    """A request of any dialect: its fields, and what becomes of those it does not have."""

    model_config = ConfigDict(extra="allow")

    harmless: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    way_out: ClassVar[Mapping[str, str]] = {}

    model: str = ""


class SamplingFields(Asked):
    """What /chat/completions and /completions have in common."""

    harmless = HARMLESS
    neutral = NEUTRAL
    way_out = WAY_OUT

    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """Not OpenAI's, but known to vLLM's clients; 0 and -1 mean all."""
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=128)
    stop: Annotated[list[StopString], BeforeValidator(_listed), Field(max_length=16)] = []
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    """vLLM's: adds `prompt_token_ids` and each choice's `token_ids` to the answer."""

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats


class ChatRequest(SamplingFields):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class CompletionRequest(SamplingFields):
    prompt: Any
    """Text, token ids, or a list of either; checked where it is encoded."""
    max_tokens: int | None = Field(16, ge=1)
    """OpenAI's default for this endpoint."""
    logprobs: int | None = Field(None, ge=0, le=20)


R = TypeVar("R", bound=Asked)


def parse_json(body: bytes) -> dict[str, Any]:
    """The request's JSON object. Raises RequestError."""
    try:
        data = from_json(body)
    except ValueError as error:
        raise RequestError(f"The request body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise RequestError(
            f"The request body must be a JSON object, not {type(data).__name__}.",
            code="invalid_json",
        )
    return data


def parse_request(kind: type[R], data: Mapping[str, Any]) -> R:
    """`data` as a request of this kind. Raises RequestError that names the field."""
    try:
        # An explicit null means the same as leaving the field out.
        request = kind.model_validate({k: v for k, v in data.items() if v is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        # The alternatives of a union are noise to whoever reads the message.
        parts = [p for p in first["loc"] if not _is_type_name(p)]
        param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).lstrip(".")
        raise RequestError(
            f"Invalid {param or 'request'}: {first['msg']} (seen: {_short(first['input'])}).",
            code="missing_required_parameter" if first["type"] == "missing" else "invalid_value",
            param=param or None,
        ) from error
    for name, value in (request.model_extra or {}).items():
        if name not in kind.harmless and value not in kind.neutral.get(name, ()):
            raise _unsupported(kind, name, value)
    return request


def _unsupported(kind: type[Asked], name: str, value: Any) -> RequestError:
    known = name in kind.neutral or name in kind.way_out
    hint = kind.way_out.get(name, "Leave it out.")
    what = "cannot be honoured" if known else "is not a parameter this server knows"
    return RequestError(
        f"{name}={_short(value)} {what}. {hint}",
        code="unsupported_parameter" if known else "unknown_parameter",
        param=name,
    )


def _is_type_name(part: str | int) -> bool:
    """Whether this part of a pydantic location names an alternative of a union."""
    return isinstance(part, str) and ("[" in part or part in {"str", "dict"})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def status_of(error: AstunerError) -> tuple[int, str]:
    """The HTTP status and OpenAI `code` of an error.

    The SDKs retry 408, 409, 429 and 5xx. A failing engine is worth that (503); what
    no retry can mend gets another status, or is marked by `retry_header`.
    """
    match error:
        case RequestError():
            return error.status, error.code or "invalid_request"
        case ContextLengthError():
            return 400, "context_length_exceeded"
        case DeadlineExceeded():
            return 504, "engine_timeout"
        case EngineClosed():
            return 503, "engine_closed"
        case EngineError():
            return 503, "engine_error"
        case _:
            return 500, "internal_error"


def retry_header(status: int, code: str) -> list[tuple[bytes, bytes]]:
    """`x-should-retry: false`, which the openai SDK obeys, where a retry is pointless."""
    hopeless = (status < 500 and status != 409) or code in {"engine_closed", "engine_timeout"}
    return [(b"x-should-retry", b"false")] if hopeless else []


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How a dialect tells errors."""

    body: Callable[[str, int, str | None, str | None], dict[str, Any]]
    """From message, status, code and param to the JSON of a refused request."""
    event: Callable[[dict[str, Any], int], tuple[str | None, dict[str, Any]]]
    """From that body and the number of events sent so far to the name and data of the last
    event of a broken stream."""


def error_json(
    message: str, status: int, code: str | None, param: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


OPENAI_ERRORS = ErrorShape(body=error_json, event=lambda body, _: (None, body))
