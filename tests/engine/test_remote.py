"""RemoteEngine against a loopback endpoint that answers as vLLM does."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from astuner.engine.protocol import SamplingParams, generate
from astuner.engine.remote import RemoteEngine
from astuner.errors import ContextLengthError, EngineError

PARAMS = SamplingParams(max_tokens=8, stop_token_ids=(2,), seed=11)


def piece(ids: list[int], finish: str | None = None, **more: Any) -> dict[str, Any]:
    top = [{f"token_id:{i}": -i / 4, "token_id:0": -9.0} for i in ids]
    logprobs = {"token_logprobs": [-i / 4 for i in ids], "top_logprobs": top}
    choice = {"index": 0, "text": "", "token_ids": ids, "logprobs": logprobs}
    return {"choices": [{**choice, "finish_reason": finish, **more}]}


GOOD = [piece([5], prompt_token_ids=[7, 8]), piece([6, 2], "stop"), {"choices": [], "usage": {}}]


@dataclass
class Endpoint:
    """Plays one script per request: a status with a body, or events to stream."""

    scripts: list[Any] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    disconnected: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    async def answer(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        script = self.scripts.pop(0)
        if isinstance(script, tuple):
            return JSONResponse(script[1], status_code=script[0])
        return StreamingResponse(self.events(script), media_type="text/event-stream")

    async def events(self, script: list[Any]) -> AsyncIterator[str]:
        try:
            for event in script:
                if event == "hang":
                    await asyncio.sleep(60)
                elif event == "break":
                    raise ConnectionError("the endpoint breaks off")
                else:
                    text = event if isinstance(event, str) else json.dumps(event)
                    yield f"data: {text}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.disconnected.set()
            raise


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    fake = Endpoint()
    app = Starlette(routes=[Route("/v1/completions", fake.answer, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    yield fake
    server.should_exit = server.force_exit = True
    thread.join(10)


@pytest.fixture
def engine(endpoint: Endpoint) -> RemoteEngine:
    return RemoteEngine(
        endpoint.url, "m", "secret", max_context=32, weight_version=3, retry_wait=0.01, timeout=20
    )


async def test_tokens_logprobs_versions_and_what_is_sent(
    endpoint: Endpoint, engine: RemoteEngine
) -> None:
    endpoint.scripts = [GOOD]
    out = await generate(engine, [7, 8], PARAMS)
    assert out.token_ids.tolist() == [5, 6, 2]
    assert out.logprobs.tolist() == [-1.25, -1.5, -0.5]
    assert out.weight_versions.tolist() == [3, 3, 3]
    assert (out.finish_reason, out.top_logprobs) == ("stop", ())
    assert endpoint.keys == ["Bearer secret"]
    assert endpoint.bodies[0] == {
        "model": "m",
        "prompt": [7, 8],
        "max_tokens": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 11,
        "stop_token_ids": [2],
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": True,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }


async def test_alternatives_come_back_by_id(endpoint: Endpoint, engine: RemoteEngine) -> None:
    endpoint.scripts = [[piece([5], "length")]]
    out = await generate(engine, [7], SamplingParams(max_tokens=1, top_logprobs=2))
    assert out.top_logprobs == ({5: -1.25, 0: -9.0},)
    assert out.finish_reason == "length"


async def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint, engine: RemoteEngine) -> None:
    endpoint.scripts = [(503, {"error": "loading"}), (429, {}), GOOD]
    out = await generate(engine, [7, 8], PARAMS)
    assert (out.token_ids.tolist(), len(endpoint.bodies)) == ([5, 6, 2], 3)


async def test_retries_end_with_status_and_body(endpoint: Endpoint, engine: RemoteEngine) -> None:
    endpoint.scripts = [(503, {"error": "loading"})] * 3
    with pytest.raises(EngineError, match=r"answered 503: .*loading"):
        await generate(engine, [7, 8], PARAMS)
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize("end", ["break", {"error": {"message": "out of memory"}}, "not json"])
async def test_no_retry_after_the_first_token(
    endpoint: Endpoint, engine: RemoteEngine, end: Any
) -> None:
    endpoint.scripts = [[GOOD[0], end], GOOD]
    with pytest.raises(EngineError):
        await generate(engine, [7, 8], PARAMS)
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ((401, {"error": "who are you"}), "answered 401: .*who are you"),
        ([piece([5], "stop", token_ids=None)], "does not return token ids"),
        ([piece([5], "stop", prompt_token_ids=[1, 7, 8])], "changed the prompt"),
    ],
)
async def test_what_no_retry_can_mend(
    endpoint: Endpoint, engine: RemoteEngine, script: Any, message: str
) -> None:
    endpoint.scripts = [script, GOOD]
    with pytest.raises(EngineError, match=message):
        await generate(engine, [7, 8], PARAMS)
    assert len(endpoint.bodies) == 1


async def test_a_stream_that_stops_short_is_an_error(
    endpoint: Endpoint, engine: RemoteEngine
) -> None:
    endpoint.scripts = [[GOOD[0]]]
    with pytest.raises(EngineError, match="without a finish_reason"):
        await generate(engine, [7, 8], PARAMS)


async def test_context_limits_here_and_there(endpoint: Endpoint, engine: RemoteEngine) -> None:
    with pytest.raises(ContextLengthError, match="32 tokens"):
        await generate(engine, [1] * 32, PARAMS)
    assert endpoint.bodies == []
    endpoint.scripts = [(400, {"error": {"code": "context_length_exceeded"}}), GOOD]
    with pytest.raises(ContextLengthError, match="has 2 tokens"):
        await generate(engine, [7, 8], PARAMS)


async def test_a_distribution_without_its_logprobs_is_refused(endpoint: Endpoint) -> None:
    warm = SamplingParams(max_tokens=4, temperature=0.7)
    with pytest.raises(EngineError, match="processed_logprobs"):
        await generate(RemoteEngine(endpoint.url, "m"), [7, 8], warm)
    endpoint.scripts = [GOOD]
    out = await generate(RemoteEngine(endpoint.url, "m", processed_logprobs=True), [7, 8], warm)
    assert (out.token_ids.tolist(), endpoint.bodies[0]["temperature"]) == ([5, 6, 2], 0.7)


async def test_nobody_there() -> None:
    engine = RemoteEngine("http://127.0.0.1:9/v1", "m", max_retries=1, retry_wait=0.0)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9/v1/completions could not be reached"):
        await generate(engine, [7], PARAMS)


async def test_cancelling_reaches_the_endpoint(endpoint: Endpoint, engine: RemoteEngine) -> None:
    endpoint.scripts = [[GOOD[0], "hang"]]
    stream = engine.stream([7, 8], PARAMS)
    first = await asyncio.wait_for(anext(stream), 10)
    assert first.token_ids == (5,)
    await stream.aclose()
    assert await asyncio.to_thread(endpoint.disconnected.wait, 10)
