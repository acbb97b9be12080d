"""An EnvClient over HTTP, for the env service that AgentScope Tuner users run.

Speaks `/create /step /evaluate /get_info /release /get_env_profile`, and `/reset` and
`/heartbeat` where the service has them (ours); elsewhere a reset makes the instance anew and
no heartbeat is sent. Every request has a deadline. It never repeats a request: whether a
lost step was taken cannot be known, so the episode is tried again instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from astuner.env.protocol import NOTHING, Action, Asked, Start, StepResult, finite_score
from astuner.env.served_class import as_message
from astuner.env.wire import read_error, read_start, read_step
from astuner.errors import EnvError

HIGHEST_PORT = 65535
OF_AN_INSTANCE = httpx.Limits(max_connections=2, keepalive_expiry=2.0)
"""One for what is under way, one to release it meanwhile. They are idle for shorter than any
service keeps its side open, so that no request meets its closing."""


class HttpEnvs:
    """Instances in a service. All methods belong to one event loop.

    Every instance has connections of its own: none waits for another's slow step, and what a
    request costs does not grow with their number (as it does in one pool of connections).
    """

    def __init__(
        self,
        url: str,
        *,
        create_timeout: float = 60.0,
        step_timeout: float = 60.0,
        lease: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`lease`: a service that knows leases frees an instance after so many seconds without
        any request or heartbeat for it."""
        self._url = url.rstrip("/")
        self._create_timeout = create_timeout
        self._step_timeout = step_timeout
        self._lease = lease
        self._beats = True
        """Whether the service is not known to have no heartbeat."""
        self._creating: dict[str, asyncio.Task[Any]] = {}
        self._made: dict[str, tuple[str, str, dict[str, Any]]] = {}
        self._transport = transport
        self._certificates = httpx.create_ssl_context(verify=self._url.startswith("https:"))
        self._connections: dict[str, httpx.AsyncClient] = {}
        """By instance; "" is for what concerns none."""

    async def create(
        self, env_type: str, task_id: str, instance_id: str, params: Mapping[str, Any]
    ) -> Start:
        """Make an instance. Raises EnvError. The request goes on where this is cancelled, and the
        release waits for it: a service would make the instance all the same, and keep it."""
        self._made[instance_id] = (env_type, task_id, dict(params))
        request = self._post(
            "create",
            self._create_timeout,
            env_type=env_type,
            task_id=task_id,
            instance_id=instance_id,
            params=dict(params),
            lease=self._lease,
        )
        self._creating[instance_id] = creating = asyncio.create_task(request)
        return read_start(await asyncio.shield(creating))

    async def reset(self, instance_id: str, seed: int | None) -> Start:
        """A new episode in the same instance, or in one of the same name."""
        params = {} if seed is None else {"seed": seed}
        try:
            return read_start(
                await self._post(
                    "reset", self._create_timeout, instance_id=instance_id, params=params
                )
            )
        except _NoSuchPath:
            env_type, task_id, given = self._made[instance_id]
            await self.release(instance_id)
            return await self.create(env_type, task_id, instance_id, {**given, **params})

    async def step(self, instance_id: str, action: Action, asked: Asked = NOTHING) -> StepResult:
        told = Asked(asked.params, as_message(action))
        return read_step(await self._ask("step", instance_id, told))

    async def evaluate(self, instance_id: str, asked: Asked = NOTHING) -> float:
        return finite_score(await self._ask("evaluate", instance_id, asked), "score")

    async def info(self, instance_id: str, asked: Asked = NOTHING) -> Any:
        return await self._ask("get_info", instance_id, asked)

    async def release(self, instance_id: str) -> None:
        self._made.pop(instance_id, None)
        creating = self._creating.pop(instance_id, None)
        if creating is not None:
            await asyncio.wait({creating})
        try:
            await self._post("release", self._step_timeout, instance_id=instance_id)
        except EnvError as error:
            if error.cause != "gone":
                raise
        finally:
            connection = self._connections.pop(instance_id, None)
            if connection is not None:
                await connection.aclose()

    async def task_ids(self, env_type: str, split: str) -> list[str]:
        data = await self._post(
            "get_env_profile", self._create_timeout, env_type=env_type, params={"split": split}
        )
        return [str(task_id) for task_id in data or []]

    async def keep_alive(self, instance_ids: Sequence[str]) -> None:
        if self._beats:
            try:
                await self._post("heartbeat", self._step_timeout, instance_ids=list(instance_ids))
            except _NoSuchPath:
                self._beats = False

    async def aclose(self) -> None:
        for connection in self._connections.values():
            await connection.aclose()
        self._connections.clear()

    def _connection(self, instance_id: str) -> httpx.AsyncClient:
        if instance_id not in self._connections:
            self._connections[instance_id] = httpx.AsyncClient(
                transport=self._transport, verify=self._certificates, limits=OF_AN_INSTANCE
            )
        return self._connections[instance_id]

    async def _ask(self, path: str, instance_id: str, asked: Asked) -> Any:
        told = {"params": dict(asked.params), "messages": asked.messages}
        return await self._post(path, self._step_timeout, instance_id=instance_id, **told)

    async def _post(self, path: str, timeout: float, **body: Any) -> Any:
        """The `data` of the answer. The deadline is for the whole exchange."""
        payload = {"messages": {}, "params": {}, **body}
        url = f"{self._url}/{path}"
        http = self._connection(str(body.get("instance_id", "")))
        try:
            request = http.build_request("POST", url, json=payload, timeout=None)
            if (request.url.port or 80) > HIGHEST_PORT:
                raise httpx.InvalidURL(f"there is no port {request.url.port}")
        except (httpx.InvalidURL, TypeError, ValueError) as error:
            raise EnvError(
                f"This cannot be sent to the environment service at {url}: {error}. Is env.url "
                "an address, and does JSON know everything in the environment's parameters?",
                cause="refused",
            ) from None
        try:
            async with asyncio.timeout(timeout):
                reply = await http.send(request)
        except TimeoutError:
            raise EnvError(
                f"The environment service did not answer {url} within {timeout:g} s.",
                cause="timeout",
            ) from None
        except httpx.HTTPError as error:
            raise EnvError(
                f"No answer from the environment service at {url} "
                f"({type(error).__name__}: {error}). Is it running?",
                cause="unavailable",
            ) from None
        if reply.status_code in (404, 405) and "instance" not in reply.text.lower():
            raise _NoSuchPath(f"The environment service has no {url}.", cause="refused")
        if reply.status_code != 200:
            raise read_error(reply.status_code, reply.text)
        return _data(reply, path)


class _NoSuchPath(EnvError):
    """The service does not have this part of the API."""


def _data(reply: httpx.Response, path: str) -> Any:
    try:
        body: Any = reply.json()
    except ValueError:
        raise EnvError(
            f"The environment service answered {path} with something that is not JSON: "
            f"{reply.text[:200]!r}",
            cause="reply",
        ) from None
    known = isinstance(body, dict) and ("data" in body or "task_ids" in body)
    if not known or not body.get("success", True):
        if path == "release":
            return None  # it had been released before
        raise EnvError(f"The environment service answered {path}: {body!r:.300}", cause="crashed")
    return body.get("data", body.get("task_ids"))
