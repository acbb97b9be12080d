"""The socket, the sync client, and what is served besides completions."""

from __future__ import annotations

import socket
import subprocess
import sys

import httpx
import openai
import pytest

from astuner.chat.byte_codec import ByteCodec
from astuner.engine.fake import FakeEngine
from astuner.errors import AstunerError, ConfigError
from astuner.model_tuner import ModelTuner, TunerServer

from .tuner_world import USER, Make


def test_the_sync_sdk_over_loopback(make: Make) -> None:
    world = make("hi")
    world.server.start()
    assert isinstance(world.tuner, ModelTuner)
    client = world.tuner.as_raw_openai_sdk_client(sync=True)
    answer = client.chat.completions.create(model="", messages=USER)
    assert answer.choices[0].message.content == "hi"
    stream = client.chat.completions.create(model="", messages=USER, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == "hi"
    assert len(world.sessions[0].calls) == 2


def test_models_and_health(make: Make) -> None:
    world = make("hi")
    world.server.start()
    client = world.tuner.as_raw_openai_sdk_client(sync=True)
    assert [m.id for m in client.models.list()] == ["astuner"]
    assert client.models.retrieve("astuner").owned_by == "astuner"
    health = httpx.get(world.server.base_url.replace("/v1", "/health"), timeout=10)
    assert health.json() == {"status": "ok", "model": "astuner"}


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = TunerServer(FakeEngine([[1]]), ByteCodec(), port=port)
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} is already in use") as caught:
            server.start()
    assert "model_tuner.port=0" in str(caught.value)


def test_a_host_that_is_not_here() -> None:
    server = TunerServer(FakeEngine([[1]]), ByteCodec(), host="192.0.2.1")
    with pytest.raises(ConfigError, match=r"cannot listen at 192[.]0"):
        server.start()


def test_every_interface_is_reached_at_loopback() -> None:
    with TunerServer(FakeEngine([[1]]), ByteCodec(), host="0.0.0.0") as server:
        assert server.base_url.startswith("http://127.0.0.1:")


def test_a_server_that_is_not_started_says_so(make: Make) -> None:
    with pytest.raises(AstunerError, match="not started"):
        make("hi").tuner.as_oai_baseurl_apikey()


def test_starting_again_after_closing(make: Make) -> None:
    world = make("hi")
    first = world.server.start().base_url
    assert world.server.start().base_url == first
    world.server.close()
    world.server.start()
    client = world.session().tuner.as_raw_openai_sdk_client(sync=True)
    assert client.chat.completions.create(model="", messages=USER).choices[0].finish_reason


def test_after_closing_nobody_answers(make: Make) -> None:
    world = make("hi")
    world.server.start()
    client = world.tuner.as_raw_openai_sdk_client(sync=True)
    world.server.close()
    with pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(model="", messages=USER)


def test_naming_the_room_loads_no_server() -> None:
    code = (
        "import sys, astuner.model_tuner; from astuner.model_tuner import SessionSampling\n"
        "print([m for m in ('uvicorn', 'openai', 'httpx', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"
