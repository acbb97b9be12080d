"""Against the env services that exist: requests and answers in the shapes of AgentScope Tuner's own
client and service (as AgentJet and AgentEvolver publish them), each side played strictly."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from astuner.env.http import HttpEnvs
from astuner.env.pool import EnvPool, PoolSettings
from astuner.env.registry import adapted
from astuner.env.server import EnvService, env_app
from astuner.errors import EnvError
from astuner.types import Task

pytestmark = pytest.mark.timeout(60)
CALL = {"id": "c1", "type": "function", "function": {"name": "ls", "arguments": "{}"}}


class Shell:
    """A world of function calls, as such services hold them: two calls end it."""

    def __init__(self, task_id: str, instance_id: str, params: dict[str, Any]) -> None:
        self.task_id, self.instance_id, self.called = task_id, instance_id, 0

    def get_init_state(self, params: dict[str, Any]) -> dict[str, Any]:
        state = [{"role": "system", "content": "Tools: ls"}, {"role": "user", "content": "Look."}]
        return {"state": state, "info": {"instance_id": self.instance_id, "task_id": self.task_id}}

    def step(self, action: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
        if action["content"] == "die":
            raise OSError("no space left")
        self.called += len(action.get("tool_calls") or ())
        answer = {"role": "tool", "content": f"{self.called} files", "tool_call_id": "c1"}
        done = self.called >= 2
        info = {"params": params}
        return {"state": [answer], "reward": float(done), "is_terminated": done, "info": info}

    def evaluate(self, messages: dict[str, Any], params: dict[str, Any]) -> Any:
        score = self.called / 2 + len(messages.get("content", ""))
        return score if params.get("sparse") else {"accuracy": score}

    def get_info(self, messages: dict[str, Any], params: dict[str, Any]) -> Any:
        return {"tools": ["ls"], "messages": messages, "params": params}

    def close(self) -> None:
        self.called = 0

    @staticmethod
    def get_query_list(split: str = "train") -> list[str]:
        return [f"{split}_1", f"{split}_2"]


# ---------------------------------------------------------------- our client, their service


class Body(BaseModel):
    """What their service accepts: objects, never null or lists, for messages and parameters."""

    env_type: str | None = "appworld"
    task_id: str | None = None
    instance_id: str | None = None
    messages: dict[str, Any] = {}
    params: dict[str, Any] = {}


class TheirService:
    """Their answers: no reward in the first state, a traceback as an error's detail, no /reset."""

    def __init__(self) -> None:
        self.worlds: dict[str, Shell] = {}
        self.asked: list[str] = []
        paths = ("get_env_profile", "create", "step", "evaluate", "get_info", "release")
        self.app = Starlette(routes=[Route(f"/{p}", self._answer, methods=["POST"]) for p in paths])

    async def _answer(self, http: Request) -> JSONResponse:
        path = http.url.path.strip("/")
        self.asked.append(path)
        try:
            return JSONResponse(self._data(path, Body.model_validate_json(await http.body())))
        except ValidationError as error:
            return JSONResponse({"detail": error.errors(include_url=False)}, 422)
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, 400)
        except OSError as error:
            told = f"Traceback (most recent call last):\n  File shell.py\nOSError: {error}"
            return JSONResponse({"detail": told}, 500)

    def _data(self, path: str, body: Body) -> dict[str, Any]:
        if path == "get_env_profile":
            return {"success": True, "data": Shell.get_query_list(body.params["split"])}
        if path == "release":
            known = self.worlds.pop(body.instance_id or "", None) is not None
            return {"success": known, "data": None}
        if path == "create":
            if not body.task_id or not body.instance_id:
                raise ValueError("task_id is required")
            world = Shell(body.task_id, body.instance_id, body.params)
            self.worlds[body.instance_id] = world
            return {"success": True, "data": world.get_init_state(body.params)}
        if body.instance_id not in self.worlds:
            raise ValueError(f"Instance {body.instance_id} not found!")
        method = getattr(self.worlds[body.instance_id], path)
        return {"success": True, "data": method(body.messages, body.params)}


def pool_of(service: TheirService) -> EnvPool:
    envs = HttpEnvs("http://theirs", transport=httpx.ASGITransport(service.app))
    return EnvPool(envs, PoolSettings("shell", {"data": "x"}, heartbeat=0.05))


async def test_an_episode_of_a_run_in_their_service() -> None:
    service = TheirService()
    pool = pool_of(service)
    env = await pool.open(Task(task_id="t7", main_query=""), "e1")
    observation, info = await env.reset()
    assert observation == [
        {"role": "system", "content": "Tools: ls"},
        {"role": "user", "content": "Look."},
    ]
    assert info["task_id"] == "t7"
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    first = await env.step(called)
    assert first[0] == [{"role": "tool", "content": "1 files", "tool_call_id": "c1"}]
    assert first[1:4] == (0.0, False, False)
    last = await env.step(called, params={"aloud": True})
    assert last[4]["params"] == {"aloud": True}
    assert last[1:4] == (1.0, True, False)
    assert await env.evaluate({"sparse": True}, messages={"content": "ok"}) == 3.0
    told = await env.get_info({"a": 1}, messages={"role": "user", "content": "hm"})
    assert told["messages"] == {"role": "user", "content": "hm"}
    assert told["params"] == {"a": 1}
    assert (await env.reset(seed=3))[0] == observation  # made anew: they know no reset
    await asyncio.sleep(0.1)  # heartbeats, which they do not know
    assert env.trouble is None
    pool.release(env)
    pool.close()
    assert service.worlds == {}


@pytest.mark.parametrize(
    ("then", "cause", "told"),
    [("die", "crashed", "OSError: no space left"), ("idle", "gone", "not found")],
)
async def test_their_trouble_has_its_cause(then: str, cause: str, told: str) -> None:
    service = TheirService()
    pool = pool_of(service)
    env = await pool.open(Task(task_id="t7", main_query=""), "e1")
    await env.reset()
    if then == "idle":
        service.worlds.clear()  # as after an hour
    with pytest.raises(EnvError, match=told) as caught:
        await env.step({"role": "assistant", "content": then})
    assert (caught.value.cause, caught.value.retriable) == (cause, True)
    pool.release(env)
    pool.close()
    assert service.worlds == {}
    assert pool.counters[f"env/failed/{cause}"] == 1
    assert pool.counters["env/release_failed"] == 0


async def test_their_list_of_tasks() -> None:
    envs = HttpEnvs("http://theirs", transport=httpx.ASGITransport(TheirService().app))
    assert await envs.task_ids("shell", "dev") == ["dev_1", "dev_2"]
    await envs.aclose()


async def test_an_older_list_of_tasks() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"task_ids": ["a"]})

    envs = HttpEnvs("http://old", transport=httpx.MockTransport(answer))
    assert await envs.task_ids("shell", "dev") == ["a"]
    await envs.aclose()


# ---------------------------------------------------------------- their client, our service


class TheirClient:
    """Sends what theirs sends: every field in every request, `default` where it names no
    environment; reads `data`, and a step's first message."""

    def __init__(self, service: EnvService) -> None:
        transport = httpx.ASGITransport(env_app(service))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://ours")

    async def ask(self, path: str, **given: Any) -> Any:
        empty = {"env_type": "default", "task_id": None, "instance_id": None}
        body = {**empty, "messages": {}, "params": {}, **given}
        reply = await self.http.post(path, json=body)
        reply.raise_for_status()
        return reply.json()

    async def step(self, instance_id: str, action: dict[str, Any]) -> Any:
        data = (await self.ask("step", instance_id=instance_id, messages=action))["data"]
        return {**data, "state": data["state"][0]}


@pytest.mark.parametrize("lost", [False, True])
async def test_an_episode_of_their_client_in_our_service(lost: bool) -> None:
    service = EnvService({"shell": adapted(Shell, "shell")})
    theirs = TheirClient(service)
    listed = await theirs.ask("/get_env_profile", env_type="shell", params={"split": "dev"})
    assert listed["data"] == ["dev_1", "dev_2"]
    wanted = {"env_type": "shell", "task_id": "t7", "instance_id": "u-1", "params": {}}
    if lost:  # the answer was, so it asks again for the same instance
        await theirs.ask("create", **wanted)
    made = (await theirs.ask("create", **wanted))["data"]
    assert [message["role"] for message in made["state"]] == ["system", "user"]
    assert (made["info"]["instance_id"], len(service.instances)) == ("u-1", 1)
    tools = await theirs.ask("get_info", instance_id="u-1", messages={"role": "user"})
    assert tools["data"]["messages"] == {"role": "user"}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    first = await theirs.step("u-1", called)
    assert first["state"] == {"role": "tool", "content": "1 files", "tool_call_id": "c1"}
    assert first["is_terminated"] is False
    assert (await theirs.step("u-1", called))["is_terminated"] is True
    asked = {"messages": {"content": "ok"}, "params": {"sparse": True}}
    assert (await theirs.ask("evaluate", instance_id="u-1", **asked))["data"] == 3.0
    assert await theirs.ask("release", instance_id="u-1") == {"success": True, "data": None}
    assert service.instances == {}
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        await theirs.step("u-1", called)
    await theirs.http.aclose()


@pytest.mark.parametrize(
    "other", [{"env_type": "shell2", "task_id": "t7"}, {"env_type": "shell", "task_id": "t8"}]
)
async def test_an_instance_is_not_replaced_by_one_of_something_else(other: dict[str, Any]) -> None:
    """Also not where the service is full: the reason is the id."""
    makers = {name: adapted(Shell, name) for name in ("shell", "shell2")}
    service = EnvService(makers, max_instances=1)
    theirs = TheirClient(service)
    await theirs.ask("create", env_type="shell", task_id="t7", instance_id="u-1")
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert (await theirs.step("u-1", called))["is_terminated"] is False
    refused = await theirs.http.post("/create", json={**other, "instance_id": "u-1"})
    assert refused.status_code == 400
    assert refused.json()["detail"].startswith("There is an instance u-1 already")
    assert service.instances == {"u-1": ("shell", "t7")}
    assert (await theirs.step("u-1", called))["is_terminated"] is True, "its second step"
    await service.aclose()
    await theirs.http.aclose()


async def test_a_world_that_shows_nothing_still_answers_with_a_message() -> None:
    class Mute:
        def __init__(self, task_id: str, params: dict[str, Any]) -> None: ...

        def reset(self, *, seed: int | None = None) -> Any:
            return "", {}

        def step(self, action: Any) -> Any:
            return [], 0.0, False, False, {}

    service = EnvService({"mute": adapted(Mute, "mute")})
    theirs = TheirClient(service)
    await theirs.ask("create", env_type="mute", instance_id="i")
    shown = await theirs.step("i", {"role": "assistant", "content": "hello"})
    assert shown["state"] == {"role": "user", "content": ""}
    await service.aclose()
    await theirs.http.aclose()
