"""The HTTP env service, both sides: over ASGI, against the plain JSON, and over a real port."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from astuner.env.http import HttpEnvs
from astuner.env.protocol import Asked, Start, StepResult
from astuner.env.registry import adapted
from astuner.env.server import DEFAULT_LEASE, EnvService, env_app
from astuner.env.wire import json_safe
from astuner.errors import EnvError

from . import worlds
from .worlds import LIMIT, Counting

pytestmark = pytest.mark.timeout(60)
NAMES = ("Counting", "Scored", "Broken", "NeverMade", "Silent", "Served", "Weighed")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def service(clock: Clock | None = None, **limits: Any) -> EnvService:
    makers = {name: adapted(getattr(worlds, name), name) for name in NAMES}
    return EnvService(makers, clock=clock or Clock(), **limits)


def transport(served: EnvService) -> httpx.ASGITransport:
    return httpx.ASGITransport(env_app(served))


def client(served: EnvService, **settings: Any) -> HttpEnvs:
    return HttpEnvs("http://env", transport=transport(served), **settings)


async def fails(cause: str, work: Any) -> EnvError:
    with pytest.raises(EnvError) as caught:
        await work
    assert caught.value.cause == cause
    return caught.value


async def test_the_json_that_existing_clients_send_and_read() -> None:
    served = service()
    async with httpx.AsyncClient(transport=transport(served), base_url="http://env") as http:

        async def post(path: str, **body: Any) -> Any:
            whole = {"env_type": "default", "task_id": None, "instance_id": None}
            reply = await http.post(path, json={**whole, "messages": {}, "params": {}, **body})
            assert reply.status_code == 200
            return reply.json()

        listed = await post("/get_env_profile", env_type="Counting", params={"split": "val"})
        assert listed == {"success": True, "data": ["val-0", "val-1", "val-2"]}
        made = await post("/create", env_type="Counting", task_id="t", params={"seed": 4})
        instance_id = made["data"]["info"]["instance_id"]
        assert made == {
            "success": True,
            "data": {
                "state": [{"role": "user", "content": "t: at 0 of 2, seed 4"}],
                "reward": 0.0,
                "is_terminated": False,
                "info": {"goal": 2, "instance_id": instance_id, "task_id": "t"},
            },
        }
        said = {"role": "assistant", "content": "up"}
        await post("/step", instance_id=instance_id, messages=said)
        assert await post("/step", instance_id=instance_id, messages=said) == {
            "success": True,
            "data": {
                "state": [{"role": "user", "content": "at 2"}],
                "reward": 1.0,
                "is_terminated": True,
                "info": {
                    "said": "up",
                    "instance_id": instance_id,
                    "terminated": True,
                    "truncated": False,
                },
            },
        }
        score = await post("/evaluate", instance_id=instance_id)
        assert score == {"success": True, "data": 1.0}
        assert await post("/get_info", instance_id=instance_id) == {"success": True, "data": None}
        released = {"success": True, "data": None}
        assert await post("/release", instance_id=instance_id) == released
        assert await post("/release", instance_id=instance_id) == {"success": False, "data": None}
        assert (await http.get("/healthz")).text == "OK"


async def test_an_episode_through_client_and_server() -> None:
    served = service()
    envs = client(served)
    assert await envs.task_ids("Served", "dev") == ["dev_a", "dev_b"]
    start = await envs.create("Counting", "t", "i", {"goal": 1, "seed": 3})
    assert start.observation == "t: at 0 of 1, seed 3"
    assert start.info == {"goal": 1, "instance_id": "i", "task_id": "t"}
    assert (await envs.step("i", "down")).observation == "at 0"
    last = await envs.step("i", {"role": "assistant", "content": "up"})
    assert (last.reward, last.terminated, last.truncated) == (1.0, True, False)
    assert (await envs.reset("i", 5)).observation == "t: at 0 of 1, seed 5"
    assert await envs.evaluate("i") == 0.0
    await envs.release("i")
    await envs.release("i")
    assert served.instances == {}
    await envs.aclose()


@pytest.mark.parametrize(
    ("action", "told"), [([0.1, 0.2], "[0.1, 0.2]"), ({"a": 1}, '{"a": 1}'), ("up", "up")]
)
async def test_a_list_or_object_arrives_as_json(action: Any, told: str) -> None:
    served = service()
    envs = client(served)
    await envs.create("Counting", "t", "i", {})
    assert (await envs.step("i", action)).info["said"] == told
    await envs.aclose()
    await served.aclose()


async def test_trouble_of_the_service_has_its_cause() -> None:
    worlds.Silent.answer = threading.Event()
    served = service(step_timeout=1.0)
    envs = client(served)
    error = await fails("refused", envs.create("Chess", "t", "i", {}))
    assert "Unknown env_type: 'Chess'. Available: ['Broken', 'Counting'" in str(error)
    assert not error.retriable
    error = await fails("crashed", envs.create("NeverMade", "t", "i", {}))
    assert "The environment's create raised OSError: no display" in str(error)
    assert "worlds.py" in error.traceback
    await fails("gone", envs.step("nobody", "up"))
    await envs.create("Broken", "t", "b", {})
    await envs.step("b", "up")
    assert "ZeroDivisionError" in str(await fails("crashed", envs.step("b", "up")))
    await envs.create("Silent", "t", "s", {})
    await fails("timeout", envs.step("s", "up"))
    worlds.Silent.answer.set()
    await served.aclose()


async def test_too_many_instances_are_refused_until_one_is_released() -> None:
    served = service(max_instances=1)
    envs = client(served)
    await envs.create("Counting", "t", "a", {})
    error = await fails("unavailable", envs.create("Counting", "t", "b", {}))
    assert error.retriable
    await envs.release("a")
    await envs.create("Counting", "t", "b", {})
    await served.aclose()


async def test_a_vanished_client_holds_nothing() -> None:
    clock = Clock()
    served = service(clock)
    envs, plain = client(served, lease=60.0), client(served, lease=0.0)
    for name in ("quiet", "busy", "beating"):
        await envs.create("Counting", "t", name, {})
    await plain.create("Counting", "t", "old", {})
    clock.now = 50.0
    await envs.step("busy", "up")
    await envs.keep_alive(["beating", "long gone"])
    clock.now = 61.0
    assert await served.release_expired() == ["quiet"]
    clock.now = 111.0
    assert sorted(await served.release_expired()) == ["beating", "busy"]
    clock.now = DEFAULT_LEASE + 1
    assert await served.release_expired() == ["old"]
    assert served.instances == {}
    async with asyncio.timeout(LIMIT):
        while Counting.open_now:
            await asyncio.sleep(0.01)


def answering(answer: Callable[[httpx.Request], httpx.Response]) -> HttpEnvs:
    """A client of some other service."""
    return HttpEnvs("http://other", transport=httpx.MockTransport(answer), step_timeout=LIMIT)


@pytest.mark.parametrize(
    ("status", "body", "cause"),
    [
        (200, "<html>login</html>", "reply"),
        (200, '{"success": false}', "crashed"),
        (200, '{"success": true, "data": {"reward": 1}}', "reply"),
        (200, '{"success": true, "data": null}', "reply"),
        (400, '{"detail": "Instance i not found!"}', "gone"),
        (400, '{"detail": "task_id is required"}', "refused"),
        (500, '{"detail": "Traceback:\\n  file x\\nKeyError: 1"}', "crashed"),
        (503, "busy", "unavailable"),
        (429, "slow down", "unavailable"),
        (504, "gateway", "timeout"),
    ],
)
async def test_what_other_services_answer(status: int, body: str, cause: str) -> None:
    envs = answering(lambda _: httpx.Response(status, text=body))
    await fails(cause, envs.step("i", "up"))


async def test_no_connection_and_no_answer() -> None:
    def refused(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    error = await fails("unavailable", answering(refused).step("i", "up"))
    assert "http://other/step" in str(error)
    assert "Is it running?" in str(error)

    async def silent(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(LIMIT)
        return httpx.Response(200)

    envs = HttpEnvs("http://other", transport=httpx.MockTransport(silent), step_timeout=0.05)
    await fails("timeout", envs.step("i", "up"))


async def test_a_service_without_reset_and_heartbeat() -> None:
    """As AgentScope Tuner's own is: a FastAPI app that answers other paths with 404."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if request.url.path in ("/reset", "/heartbeat"):
            return httpx.Response(404, json={"detail": "Not Found"})
        state = {"role": "user", "content": "hello"}
        data = {"state": state, "reward": 0, "is_terminated": True, "info": {}}
        return httpx.Response(200, json={"success": True, "data": data})

    envs = answering(answer)
    assert await envs.create("appworld", "t", "i", {}) == Start("hello", {})
    assert await envs.step("i", "x") == StepResult("hello", 0.0, True, False, {})
    assert await envs.reset("i", 1) == Start("hello", {})
    await envs.keep_alive(["i"])
    await envs.keep_alive(["i"])
    assert asked == ["/create", "/step", "/reset", "/release", "/create", "/heartbeat"]


Answer = Callable[[str], Awaitable[None]]


@asynccontextmanager
async def service_of(wait: Answer) -> AsyncGenerator[str]:
    """The address of a service that answers alike, after waiting as it is told for a path."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        await wait(head.split()[1].decode())
        body = b'{"success": true, "data": {"state": "hello", "info": {}}}'
        answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        writer.write(answer % len(body) + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=400)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_no_instance_waits_for_another() -> None:
    """300 steps are under way at once: the service answers none before it has them all."""
    arrived, all_there = 0, asyncio.Event()

    async def wait(path: str) -> None:
        nonlocal arrived
        arrived += 1
        if arrived == 300:
            all_there.set()
        await asyncio.wait_for(all_there.wait(), LIMIT)

    async with service_of(wait) as url:
        envs = HttpEnvs(url, step_timeout=LIMIT)
        steps = await asyncio.gather(*(envs.step(f"i{i}", "up") for i in range(300)))
        assert [step.observation for step in steps] == ["hello"] * 300
        await envs.aclose()


async def test_an_instance_is_released_though_its_step_is_under_way() -> None:
    stepping, released = asyncio.Event(), asyncio.Event()

    async def wait(path: str) -> None:
        if path == "/step":
            stepping.set()
            await asyncio.wait_for(released.wait(), LIMIT)

    async with service_of(wait) as url:
        envs = HttpEnvs(url, step_timeout=LIMIT)
        step = asyncio.create_task(envs.step("i", "up"))
        await asyncio.wait_for(stepping.wait(), LIMIT)
        await asyncio.wait_for(envs.release("i"), LIMIT / 4)
        released.set()
        await fails("unavailable", asyncio.wait_for(step, LIMIT))
        await envs.aclose()


async def test_a_cancelled_create_is_released_once_the_service_has_made_it() -> None:
    asked: list[str] = []
    begun = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        begun.set()
        if request.url.path == "/create":
            await asyncio.sleep(0.1)
        asked.append(request.url.path)
        return httpx.Response(200, json={"success": True, "data": {"state": "hello"}})

    envs = HttpEnvs("http://other", transport=httpx.MockTransport(answer))
    creating = asyncio.create_task(envs.create("w", "t", "i", {}))
    await asyncio.wait_for(begun.wait(), LIMIT)
    creating.cancel()
    await asyncio.gather(creating, return_exceptions=True)
    assert creating.cancelled()
    await envs.release("i")
    assert asked == ["/create", "/release"]
    await envs.aclose()


async def test_a_steps_parameters_reach_a_class_that_takes_them() -> None:
    served = service()
    async with httpx.AsyncClient(transport=transport(served), base_url="http://env") as http:
        for name, told in (("Served", True), ("Counting", None)):
            await http.post("/create", json={"env_type": name, "instance_id": name})
            said = {"role": "assistant", "content": "up"}
            body = {"instance_id": name, "messages": said, "params": {"aloud": True}}
            reply = await http.post("/step", json=body)
            assert reply.json()["data"]["info"].get("aloud") is told
    await served.aclose()


async def test_a_calls_parameters_reach_what_takes_them() -> None:
    served = service()
    envs = client(served)
    for name in ("Weighed", "Served", "Counting"):
        await envs.create(name, "t", name, {"goal": 9})
        await envs.step(name, "up")
    assert await envs.evaluate("Weighed", Asked({"weight": 0.25})) == 0.25
    assert await envs.info("Weighed", Asked({"what": 1})) == {"asked": {"what": 1}}
    assert await envs.evaluate("Served", Asked({"sparse": True})) == 0.25
    assert await envs.evaluate("Served") == 0.5
    assert await envs.info("Served", Asked({"a": 1})) == "one tool, {'goal': 9, 'a': 1}"
    assert await envs.evaluate("Counting", Asked({"sparse": True})) == 0.0
    await envs.aclose()
    await served.aclose()


@pytest.mark.parametrize(
    ("value", "safe"),
    [
        ({"a": (1, 2.5), 3: None}, {"a": [1, 2.5], "3": None}),
        ({"x": float("nan"), "y": -float("inf")}, {"x": "nan", "y": "-inf"}),
        ({(0, 1): np.float32(0.5)}, {"(0, 1)": 0.5}),
        (np.array([[1, 2]]), [[1, 2]]),
        ({"path": Path("/a")}, {"path": "/a"}),
        (True, True),
    ],
)
def test_what_json_can_say(value: Any, safe: Any) -> None:
    assert json_safe(value) == safe
    json.dumps(json_safe(value), allow_nan=False)
