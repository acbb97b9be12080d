"""Sampling over HTTP: making samplers and asking them for sequences and logprobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from astuner.engine.protocol import SamplingParams
from astuner.errors import RequestError
from astuner.service.samplers import SampleSpec
from astuner.service.service import Service
from astuner.service.wire import requests as wire
from astuner.types import token_ids

MAX_TOP = 100
"""Alternatives a token."""


class SamplingEndpoints:
    """See the module."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limit = service.limits.max_request_bytes

    def routes(self) -> Iterator[tuple[str, str, Any]]:
        yield "POST", "/create_sampling_session", self.create_sampler
        yield "GET", "/samplers/{sampler_id}", self.get_sampler
        yield "POST", "/asample", self.sample

    async def create_sampler(self, request: Request, tenant: str) -> Response:
        asked = await wire.parse(wire.CreateSampler, request, self._limit)
        record = self._service.sample_requests.open(
            tenant,
            asked.session_id,
            asked.sampling_session_seq_id,
            asked.base_model,
            asked.model_path,
        )
        body = {"type": "create_sampling_session", "sampling_session_id": record.sampler_id}
        return JSONResponse(body)

    async def get_sampler(self, request: Request, tenant: str) -> Response:
        record = self._service.samplers.find(request.path_params["sampler_id"], tenant)
        return JSONResponse(
            {
                "sampler_id": record.sampler_id,
                "base_model": record.base_model,
                "model_path": record.model_path,
            }
        )

    async def sample(self, request: Request, tenant: str) -> Response:
        asked, digest = await wire.signed(wire.Sample, request, self._limit)
        spec = self._spec(asked)
        record = self._service.sample_requests.sample(
            tenant, asked.sampling_session_id, asked.seq_id, spec, digest
        )
        ids = [f"{record.request_id}:{i}" for i in range(spec.num_samples)]
        return JSONResponse({"request_id": record.request_id, "sample_sequence_ids": ids})

    def _spec(self, asked: wire.Sample) -> SampleSpec:
        """What is to be drawn. Raises RequestError (400)."""
        if asked.target_prompt_logprobs is not None or asked.prompt_alt_tokens_k:
            raise _bad(
                "target_prompt_logprobs and prompt_alt_tokens_k are not offered here; "
                "topk_prompt_logprobs is.",
                "prompt_alt_tokens_k",
            )
        base = self._service.base
        prompt = asked.prompt.ids()
        room = base.host.max_context - len(prompt)
        if not prompt or not all(0 <= token < base.vocab_size for token in prompt):
            raise _bad(
                f"The prompt must be token ids from 0 to {base.vocab_size - 1}, at least one.",
                "prompt",
            )
        if room < 1:
            raise _bad(
                f"The prompt has {len(prompt)} tokens; the model's context is "
                f"{base.host.max_context}, and at least one must be left to sample.",
                "prompt",
            )
        self._check_counts(asked, len(prompt))
        strings, tokens = self._stops(asked.sampling_params.stop)
        return SampleSpec(
            token_ids(prompt),  # as an array it may wait for long
            asked.num_samples,
            self._params(asked, room, tokens),
            strings,
            bool(asked.prompt_logprobs),
            asked.topk_prompt_logprobs,
            asked.prompt_logprobs_last_n,
        )

    def _check_counts(self, asked: wire.Sample, prompt_tokens: int) -> None:
        most = self._service.limits.max_samples
        if not 1 <= asked.num_samples <= most:
            raise _bad(
                f"num_samples must be 1 to {most}; it is {asked.num_samples}.", "num_samples"
            )
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
            if not 0 <= getattr(asked, name) <= MAX_TOP:
                raise _bad(f"{name} must be 0 to {MAX_TOP}; it is {getattr(asked, name)}.", name)
        last_n = asked.prompt_logprobs_last_n
        if last_n is not None and not 1 <= last_n < max(prompt_tokens, 2):
            raise _bad(f"prompt_logprobs_last_n is {last_n}.", "prompt_logprobs_last_n")

    def _params(self, asked: wire.Sample, room: int, stops: Sequence[int]) -> SamplingParams:
        given = asked.sampling_params
        top_k = max(given.top_k, 0)
        fine = {
            "max_tokens": given.max_tokens is None or given.max_tokens >= 1,
            "temperature": 0 <= given.temperature < float("inf"),
            "top_p": 0 < given.top_p <= 1,
        }
        for name, is_fine in fine.items():
            if not is_fine:
                raise _bad(f"The sampler cannot use {name}={getattr(given, name)!r}.", name)
        return SamplingParams(
            max_tokens=min(given.max_tokens or room, room),
            temperature=given.temperature,
            top_p=given.top_p,
            top_k=top_k,
            stop_token_ids=tuple(stops),
            seed=None if given.seed is None else given.seed % 2**63,
            top_logprobs=asked.topk_sample_logprobs,
        )

    def _stops(self, stop: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Stop strings and stop tokens. None stops at the model's own end tokens, an empty
        list nowhere."""
        codec = self._service.codec
        own = self._own_stops()
        if stop is None:
            return (), own
        listed: list[Any] = [stop] if isinstance(stop, str) else list(stop)
        texts = tuple(s for s in listed if isinstance(s, str) and s)
        if listed and len(texts) == len(listed):
            if codec is None:
                raise _bad("Stop strings need a tokenizer, which this model lacks here.", "stop")
            return texts, own
        vocabulary = range(self._service.base.vocab_size)
        tokens = tuple(s for s in listed if isinstance(s, int) and s in vocabulary)
        if len(tokens) == len(listed):
            return (), tokens
        raise _bad("stop must be None, a text, texts, or token ids of the model.", "stop")

    def _own_stops(self) -> tuple[int, ...]:
        if self._service.codec is not None:
            return tuple(self._service.codec.stop_token_ids)
        end = getattr(self._service.base.host.tokenizer, "eos_token_id", None)
        return () if end is None else (int(end),)


def _bad(message: str, param: str) -> RequestError:
    return RequestError(message, code="invalid_sampling", param=param)
