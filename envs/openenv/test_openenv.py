"""Against a stand-in that speaks OpenEnv's WebSocket messages on a real port."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from astuner.env.registry import find_environment
from astuner.errors import EnvError

server = pytest.importorskip("websockets.sync.server", reason="the environment's requirements")
pytestmark = pytest.mark.timeout(30)


def answer(
    kind: str, data: dict[str, Any], session: dict[str, int], has_data: bool
) -> dict[str, Any]:
    """An echo that is done after two messages, and raises at "boom"."""
    if kind == "state":
        assert not has_data, "the real server refuses it"
        return {"type": "state", "data": {"step_count": session["steps"]}}
    if kind == "reset":
        session["steps"] = 0
        observation, reward = {"echoed_message": f"seed {data.get('seed')}"}, None
    elif "message" not in data:
        error = {"message": "message: field required", "code": "VALIDATION_ERROR"}
        return {"type": "error", "data": error}
    elif data["message"] == "boom":
        return {"type": "error", "data": {"message": "boom", "code": "EXECUTION_ERROR"}}
    else:
        session["steps"] += 1
        observation, reward = {"echoed_message": data["message"], "length": 2}, 0.5
    done = session["steps"] >= 2
    data = {"observation": observation, "reward": reward, "done": done}
    return {"type": "observation", "data": data}


@pytest.fixture
def url() -> Iterator[str]:
    def serve(socket: Any) -> None:
        session: dict[str, int] = {}
        for raw in socket:
            asked = json.loads(raw)
            data = asked.get("data", {})
            if data.get("message") == "die":
                return
            socket.send(json.dumps(answer(asked["type"], data, session, "data" in asked)))

    with server.serve(serve, "127.0.0.1", 0) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.socket.getsockname()[1]}"
        running.shutdown()


def env(url: str, **params: Any) -> Any:
    return find_environment("openenv")("t", {"url": url, "timeout": 5, **params})


def test_an_episode(url: str) -> None:
    echo = env(url, observation="echoed_message")
    assert echo.reset(seed=4)[0] == "seed 4"
    assert echo.step("hi")[:4] == ("hi", 0.5, False, False)
    assert echo.get_info() == {"step_count": 1}
    assert echo.step('{"message": "yo"}')[:4] == ("yo", 0.5, True, False)
    assert echo.evaluate() == 1.0
    echo.close()


def test_sessions_are_apart_and_the_whole_observation_is_json(url: str) -> None:
    first, second = env(url), env(url)
    first.reset()
    second.reset()
    assert first.step("a")[0] == '{"echoed_message": "a", "length": 2}'
    assert (first.get_info(), second.get_info()) == ({"step_count": 1}, {"step_count": 0})
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("action", "cause"), [("boom", "crashed"), ({"text": "x"}, "refused"), ("die", "gone")]
)
def test_trouble(url: str, action: Any, cause: str) -> None:
    echo = env(url)
    echo.reset()
    with pytest.raises(EnvError) as caught:
        echo.step(action)
    assert caught.value.cause == cause


def test_no_server_and_no_url(url: str) -> None:
    with pytest.raises(EnvError, match="Is it running") as caught:
        env("http://127.0.0.1:9")
    assert caught.value.cause == "unavailable"
    with pytest.raises(EnvError, match="must name"):
        env("")


@pytest.mark.parametrize(
    ("url", "ws"),
    [
        ("http://a:1", "ws://a:1/ws"),
        ("https://a/", "wss://a/ws"),
        ("ws://a:1/ws", "ws://a:1/ws"),
        ("a:1", "ws://a:1/ws"),
    ],
)
def test_urls(url: str, ws: str) -> None:
    module = __import__("envs.openenv.environment", fromlist=["websocket_url"])
    assert module.websocket_url(url) == ws
