"""Requests as they come: the SDK's own types, made tolerant of fields that they do not know.

The SDK's request types refuse unknown fields, so that its users notice slips; a server
must not, or every newer SDK would be refused. Bodies that do not fit are RequestErrors
(422) that name the field. What the values mean is checked where they are used.
"""

# Narrowing a field of a frozen model is sound; pyright takes it for a mutable attribute.
# pyright: reportIncompatibleVariableOverride=false, reportGeneralTypeIssues=false

from __future__ import annotations

import asyncio
import json
from hashlib import blake2b
from typing import Any, TypeVar

from pydantic import AliasChoices, BaseModel, Field, ValidationError, field_validator
from starlette.requests import ClientDisconnect, Request
from tinker import types

from astuner.errors import RequestError

M = TypeVar("M", bound=BaseModel)
LARGE = 100_000
"""Bytes of JSON that take a millisecond or more to read."""


class CreateSession(types.CreateSessionRequest, extra="ignore"):
    tags: list[str] = Field(default_factory=list[str])
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""


class Heartbeat(types.SessionHeartbeatRequest, extra="ignore"):
    pass


class Lora(types.LoraConfig, extra="ignore"):
    pass


class CreateModel(types.CreateModelRequest, extra="ignore"):
    lora_config: Lora | None = None


class ModelInfo(types.GetInfoRequest, extra="ignore"):
    pass


class Adam(types.AdamParams, extra="ignore"):
    pass


class OptimStep(types.OptimStepRequest, extra="ignore"):
    optim_params: Adam = Field(
        validation_alias=AliasChoices("optim_params", "adam_params", "optimizer_params")
    )
    seq_id: int

    @field_validator("optim_params", mode="before")
    @classmethod
    def _is_adam(cls, value: Any) -> Any:
        kind = value.get("type", "adamw") if isinstance(value, dict) else "adamw"
        if kind not in ("adam", "adamw"):
            raise ValueError(f"the optimizer is AdamW, not {kind!r}")
        return value


class SaveState(types.SaveWeightsRequest, extra="ignore"):
    seq_id: int


class SaveForSampler(types.SaveWeightsForSamplerRequest, extra="ignore"):
    seq_id: int


class LoadState(types.LoadWeightsRequest, extra="ignore"):
    optimizer: bool = False


class CreateSampler(types.CreateSamplingSessionRequest, extra="ignore"):
    pass


class Chunk(BaseModel, extra="ignore"):
    type: str = "encoded_text"
    tokens: list[int] = Field(default_factory=list[int])


class Prompt(BaseModel, extra="ignore"):
    chunks: list[Chunk]

    def ids(self) -> list[int]:
        """All tokens. Raises RequestError (400) when it holds anything else."""
        for chunk in self.chunks:
            if chunk.type != "encoded_text":
                raise RequestError(
                    f"The prompt has a chunk of type {chunk.type!r}; this service reads text only.",
                    code="unsupported_chunk",
                    param="prompt",
                )
        return [token for chunk in self.chunks for token in chunk.tokens]


class Sample(types.SampleRequest, extra="ignore"):
    prompt: Prompt
    seq_id: int = 0
    sampling_session_id: str


class Retrieve(types.FutureRetrieveRequest, extra="ignore"):
    pass


class Cancel(BaseModel, extra="ignore"):
    request_id: str


class TinkerPath(BaseModel, extra="ignore"):
    tinker_path: str


class Ttl(BaseModel, extra="ignore"):
    ttl_seconds: int | None = None


# ---------------------------------------------------------------- from the wire


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises RequestError: 413 when it is too large, 415 when encoded."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError(
            "This service reads plain bodies only, without Content-Encoding.",
            status=415,
            code="unsupported_encoding",
        )
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise RequestError(
                    f"The request has more than {limit} bytes, the most this server takes at "
                    "once. Send less data in one call.",
                    status=413,
                    code="request_too_large",
                )
    except ClientDisconnect:
        raise RequestError("The client left.", status=400, code="client_left") from None
    return bytes(body)


async def parse(kind: type[M], request: Request, limit: int) -> M:
    """The JSON body as `kind`. Raises RequestError (422) naming the fields at fault."""
    return validate(kind, await read_body(request, limit))


async def signed(kind: type[M], request: Request, limit: int) -> tuple[M, str]:
    """`parse`, and the request's digest: equal for equal requests. Large ones are read on
    another thread, as others wait meanwhile."""
    body = await read_body(request, limit)
    if len(body) > LARGE:
        return await asyncio.to_thread(_signed, kind, body)
    return _signed(kind, body)


def _signed(kind: type[M], body: bytes) -> tuple[M, str]:
    asked = validate(kind, body)
    return asked, digest(asked)


def validate(kind: type[M], body: bytes) -> M:
    try:
        return kind.model_validate_json(body or b"{}")
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in e['loc']) or 'body'}: {e['msg']}"
            for e in error.errors(include_input=False, include_url=False)[:5]
        ]
        raise RequestError(
            f"The request is not a valid {kind.__name__}: {'; '.join(problems)}.",
            status=422,
            code="invalid_request",
        ) from None


def digest(request: BaseModel) -> str:
    """Equal for equal requests."""
    text = json.dumps(request.model_dump(mode="json", exclude={"type"}), sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()
