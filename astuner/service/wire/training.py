"""Training over HTTP: making runs, their operations, and fetching what became of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from astuner.errors import CheckpointError, RequestError
from astuner.service import training
from astuner.service.datums import TrainRequest
from astuner.service.protobuf import parse_train_request
from astuner.service.records import Shape
from astuner.service.run_requests import NewRun
from astuner.service.service import Service
from astuner.service.training import Save
from astuner.service.wire import requests as wire

logger = logging.getLogger(__name__)

STORE_SECONDS = 1.0
"""Between two tries to read an answer that the store does not give; the SDK asks at once."""


class TrainingEndpoints:
    """See the module."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._requests = service.run_requests
        self._limit = service.limits.max_request_bytes

    def routes(self) -> Iterator[tuple[str, str, Any]]:
        yield "POST", "/create_model", self.create_model
        yield "POST", "/get_info", self.get_info
        yield "POST", "/forward_backward", self.forward_backward
        yield "POST", "/optim_step", self.optim_step
        yield "POST", "/save_weights", self.save_state
        yield "POST", "/save_weights_for_sampler", self.save_for_sampler
        yield "POST", "/load_weights", self.load_state
        yield "POST", "/retrieve_future", self.retrieve
        yield "POST", "/cancel_future", self.cancel

    # ------------------------------------------------------------ runs

    async def create_model(self, request: Request, tenant: str) -> Response:
        asked, digest = await wire.signed(wire.CreateModel, request, self._limit)
        if asked.optimizer_config.type not in ("adam", "adamw"):
            raise RequestError(
                f"The optimizer {asked.optimizer_config.type!r} is not offered here; AdamW is.",
                code="unknown_optimizer",
                param="optimizer_config",
            )
        lora = asked.lora_config or wire.Lora(rank=32)
        shape = Shape(lora.rank, lora.train_mlp, lora.train_attn, lora.train_unembed)
        wish = NewRun(asked.base_model, shape, lora.seed, asked.user_metadata)
        name = self._requests.create(tenant, asked.session_id, asked.model_seq_id, wish, digest)
        return _future(name)

    async def get_info(self, request: Request, tenant: str) -> Response:
        asked = await wire.parse(wire.ModelInfo, request, self._limit)
        run = self._service.runs.find(asked.model_id, tenant)
        base = self._service.base
        data = {
            "arch": base.arch,
            "model_name": base.name,
            "tokenizer_id": base.tokenizer_id,
        }
        return JSONResponse(
            {
                "type": "get_info",
                "model_data": data,
                "model_id": run.run_id,
                "is_lora": True,
                "lora_rank": run.shape.rank,
                "model_name": base.name,
                "optimizer_config": {"type": "adamw"},
            }
        )

    # ------------------------------------------------------------ operations

    async def forward_backward(self, request: Request, tenant: str) -> Response:
        body = await wire.read_body(request, self._limit)
        asked, digest = await asyncio.to_thread(_decoded, body)
        return _future(self._requests.forward_backward(tenant, asked, digest), asked.run_id)

    async def optim_step(self, request: Request, tenant: str) -> Response:
        asked, digest = await wire.signed(wire.OptimStep, request, self._limit)
        name = self._requests.optim_step(
            tenant,
            asked.model_id,
            asked.seq_id,
            training.adam(asked.optim_params.model_dump()),
            digest,
        )
        return _future(name, asked.model_id)

    async def save_state(self, request: Request, tenant: str) -> Response:
        asked, digest = await wire.signed(wire.SaveState, request, self._limit)
        save = Save(asked.path, asked.ttl_seconds, asked.overwrite, asked.user_metadata)
        name = self._requests.save_state(tenant, asked.model_id, asked.seq_id, save, digest)
        return _future(name, asked.model_id)

    async def save_for_sampler(self, request: Request, tenant: str) -> Response:
        asked, digest = await wire.signed(wire.SaveForSampler, request, self._limit)
        ids = (tenant, asked.model_id, asked.seq_id)
        if asked.sampling_session_seq_id is not None and asked.path is None:
            inflight = asked.kind == "inflight"
            number = asked.sampling_session_seq_id
            name = self._requests.open_sampler(*ids, number, inflight, digest)
        else:
            save = Save(asked.path, asked.ttl_seconds, False, asked.user_metadata)
            name = self._requests.save_for_sampler(*ids, save, digest)
        return _future(name, asked.model_id)

    async def load_state(self, request: Request, tenant: str) -> Response:
        """Into a run that exists, or into a new one ("create via load")."""
        asked, digest = await wire.signed(wire.LoadState, request, self._limit)
        if asked.model_id is not None and asked.seq_id is not None:
            name = self._requests.load_state(
                tenant, asked.model_id, asked.seq_id, asked.path, asked.optimizer, digest
            )
            return _future(name, asked.model_id)
        if asked.session_id is None or asked.model_seq_id is None:
            raise RequestError(
                "Give model_id and seq_id, or session_id and model_seq_id.", code="missing_id"
            )
        name = self._requests.create_from(
            tenant,
            asked.session_id,
            asked.model_seq_id,
            asked.user_metadata,
            asked.path,
            asked.optimizer,
            digest,
        )
        return _future(name)

    # ------------------------------------------------------------ futures

    async def retrieve(self, request: Request, tenant: str) -> Response:
        """What became of a request: its result, its error, or (408) nothing yet."""
        asked = await wire.parse(wire.Retrieve, request, self._limit)
        futures = self._service.futures
        record = await futures.wait(asked.request_id, tenant, self._service.limits.poll_seconds)
        if record.status == "pending":
            return _not_yet(record.request_id)
        if record.status == "lost":
            raise RequestError(
                "The server was stopped before this was drawn. Send the request again.",
                status=410,
                code="request_lost",
            )
        if record.status == "failed":
            return JSONResponse({"error": record.error, "category": record.category})
        try:
            answer = futures.answer(record)
        except CheckpointError as error:  # it is there, and can be had when the store is back
            logger.error("%s", error)
            await asyncio.sleep(min(STORE_SECONDS, self._service.limits.poll_seconds))
            return _not_yet(record.request_id)
        return Response(answer.body, media_type=answer.content_type)

    async def cancel(self, request: Request, tenant: str) -> Response:
        asked = await wire.parse(wire.Cancel, request, self._limit)
        self._service.sample_requests.cancel(tenant, asked.request_id)
        return JSONResponse({})


def _not_yet(request_id: str) -> JSONResponse:
    body = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
    return JSONResponse(body, 408)


def _decoded(body: bytes) -> tuple[TrainRequest, str]:
    asked = parse_train_request(body)
    return asked, asked.digest()


def _future(request_id: str, model_id: str | None = None) -> JSONResponse:
    return JSONResponse({"request_id": request_id, "model_id": model_id})
