"""A service in this process: the unigram host behind the app, and a client that speaks the
protocol as the SDK does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tinker.proto import tinker_public_pb2 as pb

from astuner.chat.protocol import ChatCodec
from astuner.service.base_model import BaseModel
from astuner.service.limits import Limits
from astuner.service.observe import Observer
from astuner.service.openai import OpenAIEndpoints
from astuner.service.service import Service
from astuner.service.store.memory import MemoryStore
from astuner.service.store.protocol import Store
from astuner.service.tenants import Tenants
from astuner.service.wire.app import build_app
from astuner.service.wire.intake import Intake
from tests.service.unigram import VOCAB, UnigramHost

KEYS = {"alice": "tml-alice-key-1", "bob": "tml-bob-key-22"}
MODEL = "unigram"


class Client:
    """One tenant's HTTP client."""

    def __init__(self, http: httpx.AsyncClient, key: str, model: str = MODEL) -> None:
        self.http = http
        self.model = model
        self.headers = {"X-API-Key": key}

    async def call(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {**self.headers, **more.pop("headers", {})}
        return await self.http.request(method, f"/api/v1{path}", headers=headers, **more)

    async def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        response = await self.call("POST", path, json=body or {})
        assert response.status_code == 200, response.text
        return response.json()

    async def get(self, path: str) -> dict[str, Any]:
        response = await self.call("GET", path)
        assert response.status_code == 200, response.text
        return response.json()

    async def refused(self, status: int, method: str, path: str, **more: Any) -> str:
        """The detail of an answer with this status."""
        response = await self.call(method, path, **more)
        assert response.status_code == status, (response.status_code, response.text)
        return response.json()["detail"]

    async def result(self, request_id: str) -> httpx.Response:
        """What became of a request, however often it has to be asked."""
        for _ in range(50):
            response = await self.call("POST", "/retrieve_future", json={"request_id": request_id})
            if response.status_code != 408:
                return response
        raise AssertionError(f"{request_id} is never answered")

    async def done(self, future: dict[str, Any]) -> Any:
        """The result of a future: JSON, or the protobuf message."""
        response = await self.result(future["request_id"])
        assert response.status_code == 200, response.text
        if response.headers["content-type"] == "application/x-protobuf":
            kind = pb.SampleResponse if ":sample:" in future["request_id"] else None
            return (kind or pb.ForwardBackwardOutput).FromString(response.content)
        body = response.json()
        assert "error" not in body, body
        return body

    async def failure(self, future: dict[str, Any]) -> tuple[str, str]:
        """(category, error) of a future that failed."""
        body = (await self.result(future["request_id"])).json()
        return body["category"], body["error"]

    # ------------------------------------------------------------ what the SDK does

    async def session(self) -> str:
        body = {"tags": [], "user_metadata": {"who": "me"}, "sdk_version": "0.38.0"}
        return (await self.post("/create_session", body))["session_id"]

    async def create(self, session: str, number: int = 0, rank: int = 4, **lora: Any) -> str:
        future = await self.post(
            "/create_model",
            {
                "session_id": session,
                "model_seq_id": number,
                "base_model": self.model,
                "lora_config": {"rank": rank, **lora},
            },
        )
        return (await self.done(future))["model_id"]

    async def train(self, run: str, seq: int, *ids: Sequence[int], **more: Any) -> dict[str, Any]:
        """Submit a forward_backward over these sequences."""
        response = await self.call(
            "POST",
            "/forward_backward",
            content=train_body(run, seq, ids, **more),
            headers={"Content-Type": "application/x-protobuf"},
        )
        assert response.status_code == 200, response.text
        return response.json()

    async def step(self, run: str, seq: int, lr: float = 0.1) -> dict[str, Any]:
        body = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": lr}}
        return await self.post("/optim_step", body)

    async def save(self, run: str, seq: int, name: str, **more: Any) -> dict[str, Any]:
        body = {"model_id": run, "seq_id": seq, "path": name, **more}
        return await self.post("/save_weights", body)

    async def save_sampler(self, run: str, seq: int, name: str, **more: Any) -> dict[str, Any]:
        body = {"model_id": run, "seq_id": seq, "path": name, **more}
        return await self.post("/save_weights_for_sampler", body)

    async def sampler(self, session: str, number: int = 0, path: str | None = None) -> str:
        body = {"session_id": session, "sampling_session_seq_id": number}
        body |= {"model_path": path} if path else {"base_model": self.model}
        return (await self.post("/create_sampling_session", body))["sampling_session_id"]

    async def sample(self, sampler: str, seq: int = 0, **more: Any) -> dict[str, Any]:
        return await self.post("/asample", sample_body(sampler, seq, **more))


def sample_body(
    sampler: str, seq: int = 0, prompt: Sequence[int] = (1, 2), n: int = 1, **params: Any
) -> dict[str, Any]:
    top = {k: params.pop(k) for k in list(params) if "prompt" in k or "topk_" in k}
    return {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "num_samples": n,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
        "sampling_params": {"max_tokens": 4, **params},
        **top,
    }


def tensor(values: Sequence[float] | Sequence[int], dtype: str = "<f4") -> pb.Tensor:
    kind = pb.DTYPE_FLOAT32 if dtype == "<f4" else pb.DTYPE_INT64
    return pb.Tensor(dense=np.asarray(values, dtype).tobytes(), dtype=kind, shape=[len(values)])


def train_body(
    run: str,
    seq: int,
    ids: Sequence[Sequence[int]],
    *,
    loss: str = "cross_entropy",
    forward_only: bool = False,
    config: dict[str, float] | None = None,
    **inputs: Sequence[float],
) -> bytes:
    """Next-token prediction on `ids`, each input the same for all of them."""
    message = pb.ForwardBackwardRequest(
        model_id=run, seq_id=seq, loss_fn=loss, forward_only=forward_only
    )
    for name, value in (config or {}).items():
        message.loss_fn_config[name] = value
    for sequence in ids:
        datum = message.data.add()
        tokens = np.asarray(sequence[:-1], "<i4")
        datum.model_input.add().encoded_text.tokens = tokens.tobytes()
        datum.loss_fn_inputs["target_tokens"].CopyFrom(tensor(sequence[1:], "<i8"))
        given = dict(inputs)
        if loss == "cross_entropy":
            given.setdefault("weights", [1.0] * len(tokens))
        for name, values in given.items():
            datum.loss_fn_inputs[name].CopyFrom(tensor(values))
    return message.SerializeToString()


def logprobs_of(output: pb.ForwardBackwardOutput) -> list[np.ndarray[Any, Any]]:
    """Per datum, [T]."""
    field = output.loss_fn_outputs[0].fields["logprobs"]
    offsets = np.frombuffer(field.offsets, "<i8") // 4
    values = np.frombuffer(field.data, "<f4")
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


class World:
    """A running service and its clients."""

    def __init__(
        self, service: Service, host: UnigramHost, http: httpx.AsyncClient, app: Any
    ) -> None:
        self.service = service
        self.intake: Intake = app.app
        self.host = host
        self.alice = Client(http, KEYS["alice"])
        self.bob = Client(http, KEYS["bob"])
        self.http = http

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for what the service does by itself."""
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def world(
    data: Path,
    *,
    store: Store | None = None,
    host: UnigramHost | None = None,
    observer: Observer | None = None,
    codec: ChatCodec | None = None,
    close: bool = True,
    **limits: Any,
) -> AsyncIterator[World]:
    """`close=False` leaves as a killed process does: nothing is tidied up."""
    host = host or UnigramHost()
    base = BaseModel(MODEL, host, VOCAB)
    fast = {"poll_seconds": 0.2, **limits}
    service = Service(
        base, store or MemoryStore(), data, limits=Limits(**fast), observer=observer, codec=codec
    )
    tenants = Tenants(KEYS)
    app = build_app(service, tenants, OpenAIEndpoints(service, tenants))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
        await service.start()
        try:
            yield World(service, host, http, app)
        finally:
            if close:
                await service.close()
            else:
                await service.chores.stop()
