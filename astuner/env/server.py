"""The HTTP env service: the API that AgentScope Tuner users run, over LocalEnvs.

`env_app` is a Starlette app with `/get_env_profile /create /step /evaluate /get_info /release`,
`/reset`, `/heartbeat` and `/healthz`. An instance that nobody asked for or kept alive during
its lease is released, so that a client which vanished holds nothing. It starts no server:
`service_process` and the command do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from astuner.env.local import LocalEnvs
from astuner.env.protocol import Asked, EnvMaker
from astuner.env.wire import STATUS, Request, json_safe, read_action, start_data, step_data
from astuner.errors import AstunerError, EnvError

DEFAULT_LEASE = 3600.0
"""Seconds that an instance lives for a client that says nothing of leases."""

Handler = Callable[["EnvService", Request], Awaitable[Any]]


class EnvService:
    """The environments of one process, by name, and their leases."""

    def __init__(
        self,
        environments: Mapping[str, EnvMaker],
        *,
        create_timeout: float = 60.0,
        step_timeout: float = 60.0,
        max_instances: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._environments = environments
        self._envs = LocalEnvs(self._find, create_timeout=create_timeout, step_timeout=step_timeout)
        self._max_instances = max_instances
        self._clock = clock
        self._leases: dict[str, tuple[float, float]] = {}
        """Instance id -> (seconds, when it ends)."""

    @property
    def instances(self) -> Mapping[str, tuple[str, str]]:
        """Instance id -> environment and task, of all that exist."""
        return self._envs.instances

    async def release_expired(self) -> list[str]:
        """Release whose lease has ended; their ids."""
        now = self._clock()
        expired = [name for name, (_, ends) in self._leases.items() if ends < now]
        for instance_id in expired:
            await self._let_go(instance_id)
        return expired

    async def aclose(self) -> None:
        await self._envs.aclose()

    # ---------------------------------------------------------------- the API

    async def get_env_profile(self, request: Request) -> list[str]:
        split = str(request.params.get("split", "train"))
        return await self._envs.task_ids(_needed(request.env_type, "env_type"), split)

    async def create(self, request: Request) -> Any:
        env_type, task_id = _needed(request.env_type, "env_type"), request.task_id or ""
        self._find(env_type)
        if request.instance_id and request.instance_id in self._envs.instances:
            if self._envs.instances[request.instance_id] != (env_type, task_id):
                raise EnvError(
                    f"There is an instance {request.instance_id} already, for another environment "
                    "or task; release it first, or choose another instance_id.",
                    cause="refused",
                )
            # Asked again by a client that lost the answer.
            await self._let_go(request.instance_id)
        if len(self._envs.instances) >= self._max_instances:
            raise EnvError(
                f"There are {self._max_instances} instances already; release some, or start the "
                "service with a higher --max-instances.",
                cause="unavailable",
            )
        instance_id = request.instance_id or f"exp_{int(time.time())}_{uuid4().hex[:8]}"
        start = await self._envs.create(env_type, task_id, instance_id, request.params)
        lease = request.lease or DEFAULT_LEASE
        self._leases[instance_id] = (lease, self._clock() + lease)
        return start_data(start, instance_id, task_id)

    async def reset(self, request: Request) -> Any:
        instance_id = self._used(request)
        start = await self._envs.reset(instance_id, request.params.get("seed"))
        return start_data(start, instance_id, request.task_id or "")

    async def step(self, request: Request) -> Any:
        instance_id = self._used(request)
        action = read_action(request.messages)
        result = await self._envs.step(instance_id, action, Asked(request.params))
        return step_data(result, instance_id)

    async def evaluate(self, request: Request) -> float:
        return await self._envs.evaluate(self._used(request), _asked(request))

    async def get_info(self, request: Request) -> Any:
        return json_safe(await self._envs.info(self._used(request), _asked(request)))

    async def release(self, request: Request) -> bool:
        """Whether there was such an instance."""
        return await self._let_go(_needed(request.instance_id, "instance_id"))

    async def heartbeat(self, request: Request) -> None:
        for instance_id in request.instance_ids:
            self._touch(instance_id)

    # ---------------------------------------------------------------- inside

    def _find(self, env_type: str) -> EnvMaker:
        if env_type not in self._environments:
            raise EnvError(
                f"Unknown env_type: {env_type!r}. Available: {sorted(self._environments)}",
                cause="refused",
            )
        return self._environments[env_type]

    def _used(self, request: Request) -> str:
        instance_id = _needed(request.instance_id, "instance_id")
        self._touch(instance_id)
        return instance_id

    def _touch(self, instance_id: str) -> None:
        if instance_id in self._leases:
            seconds, _ = self._leases[instance_id]
            self._leases[instance_id] = (seconds, self._clock() + seconds)

    async def _let_go(self, instance_id: str) -> bool:
        self._leases.pop(instance_id, None)
        known = instance_id in self._envs.instances
        await self._envs.release(instance_id)
        return known


def env_app(service: EnvService, *, cleanup_interval: float = 5.0) -> Starlette:
    """The service as an ASGI app; it releases everything when it shuts down."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        cleaning = asyncio.create_task(_clean(service, cleanup_interval))
        try:
            yield
        finally:
            cleaning.cancel()
            await service.aclose()

    handlers: dict[str, Handler] = {
        "get_env_profile": EnvService.get_env_profile,
        "create": EnvService.create,
        "reset": EnvService.reset,
        "step": EnvService.step,
        "evaluate": EnvService.evaluate,
        "get_info": EnvService.get_info,
        "release": EnvService.release,
        "heartbeat": EnvService.heartbeat,
    }
    routes = [
        Route(f"/{name}", _endpoint(service, name, handler), methods=["POST"])
        for name, handler in handlers.items()
    ]
    return Starlette(routes=[*routes, Route("/healthz", _healthz)], lifespan=lifespan)


def _endpoint(
    service: EnvService, name: str, handler: Handler
) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def endpoint(http: HttpRequest) -> Response:
        try:
            request = Request.model_validate_json(await http.body())
            data = await handler(service, request)
        except ValidationError as error:
            return JSONResponse({"detail": f"The request is not valid: {error}"}, 422)
        except EnvError as error:
            return JSONResponse({"detail": _told(error)}, STATUS[error.cause])
        except AstunerError as error:
            return JSONResponse({"detail": str(error)}, 400)
        if name == "release":
            return JSONResponse({"success": data, "data": None})
        return JSONResponse({"success": True, "data": data})

    return endpoint


def _told(error: EnvError) -> str:
    """Where the environment's code raised, and last what it means."""
    return f"{error.traceback}{error}" if error.traceback else str(error)


async def _healthz(_: HttpRequest) -> Response:
    return PlainTextResponse("OK")


async def _clean(service: EnvService, interval: float) -> None:
    while True:
        await asyncio.sleep(interval)
        await service.release_expired()


def _asked(request: Request) -> Asked:
    return Asked(request.params, request.messages)


def _needed(value: str | None, name: str) -> str:
    if not value:
        raise EnvError(f"{name} is required", cause="refused")
    return value
