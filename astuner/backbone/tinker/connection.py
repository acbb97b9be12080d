"""The way to a service: the official SDK's client, with deadlines and errors of ours.

The only module that touches the SDK's clients. The SDK repeats what the network lost, for
minutes or for ever; here every wait ends, at its deadline or when the service has not been
seen for a while. Works with SDK 0.25 (some calls block) and 0.38 (they give futures).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from astuner.errors import ConfigError, DeadlineExceeded, EngineError, MissingDependency

LOOK_SECONDS = 10.0
"""How often the service is looked at while something waits for it."""
CLOSE_SECONDS = 10.0
RESUME = "What was finished is saved: go on with --resume."


class Refused(EngineError):
    """The service was there, and found the request itself wrong; it did nothing of it."""


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds."""

    request: float = 3600.0
    """For one request, its turn in the service's queue included."""
    outage: float = 120.0
    """For a service that does not answer at all."""


@dataclass(frozen=True)
class Offered:
    """A model of the service."""

    name: str
    max_context: int | None
    trainable: bool


class Connection:
    """One session of the service; usable from any thread and loop."""

    def __init__(self, base_url: str, api_key: str | None, patience: Patience) -> None:
        """Raises MissingDependency. Nothing is sent before `open`."""
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self.patience = patience
        self.sdk = _sdk()
        self._client: Any = None
        self._seen = self._looked = time.monotonic()
        self._lock = threading.Lock()

    async def open(self, metadata: Mapping[str, str]) -> None:
        """Begin a session. Raises EngineError when nobody answers, ConfigError for a key
        that is refused."""
        if why := await self._trouble():
            raise EngineError(
                f"No service answers at {self.base_url} ({why}). Start one, e.g. with "
                "`astuner serve`, or correct service.base_url."
            )

        def begin() -> Any:
            client = self.sdk.ServiceClient(
                base_url=self.base_url, api_key=self.api_key, user_metadata=dict(metadata)
            )
            assert client.holder is not None  # makes the session
            return client

        self._client = await self.ask("A session", begin)

    def close(self) -> None:
        """Tell the service that it is over. The SDK's loop lives on."""
        close = getattr(self._client, "close", None)
        if close is not None:
            # Nobody to tell: the service ends it in its own time.
            with suppress(self.sdk.TinkerError, TimeoutError, OSError, RuntimeError):
                close("success").future().result(CLOSE_SECONDS)

    # ------------------------------------------------------------ what is asked

    async def models(self) -> list[Offered]:
        """What the service offers."""
        rest = self.rest()
        asked = rest if hasattr(rest, "get_server_capabilities") else self._client
        found = await self.ask("The list of models", asked.get_server_capabilities)
        return [
            Offered(m.model_name, m.max_context_length, getattr(m, "trainable", None) is not False)
            for m in found.supported_models
        ]

    async def create(self, base_model: str, rank: int, seed: int, parts: Mapping[str, bool]) -> Any:
        """A training client with a new adapter."""
        return await self.ask(
            f"An adapter of {base_model!r}",
            lambda: self._client.create_lora_training_client(
                base_model=base_model, rank=rank, seed=seed, **parts
            ),
        )

    async def resume(self, path: str, *, optimizer: bool) -> Any:
        """A training client that goes on from a saved state."""
        name = "create_training_client_from_state" + ("_with_optimizer" if optimizer else "")
        return await self.ask(f"The state {path}", lambda: getattr(self._client, name)(path))

    async def base_sampler(self, base_model: str) -> Any:
        return await self.ask(
            f"A sampler of {base_model!r}",
            lambda: self._client.create_sampling_client(base_model=base_model),
        )

    async def delete(self, path: str) -> None:
        """A checkpoint that is no longer needed."""
        rest = self.rest()
        await self.ask(f"Deleting {path}", lambda: rest.delete_checkpoint_from_tinker_path(path))

    def rest(self) -> Any:
        """The SDK's REST client."""
        try:
            return self.sdk.RestClient(base_url=self.base_url, api_key=self.api_key)
        except (AttributeError, TypeError):  # before SDK 0.3x it is made by the service client
            return self._client.create_rest_client()

    # ------------------------------------------------------------ waiting

    async def ask(
        self,
        what: str,
        make: Callable[[], Any],
        *,
        deadline: float | None = None,
        blocks: bool = True,
    ) -> Any:
        """The result of what `make` begins; `blocks` if it might not return at once.

        Raises DeadlineExceeded, ConfigError (key), or EngineError with what the service said.
        """
        work = asyncio.ensure_future(self._settle(make, blocks))
        limit = time.monotonic() + (deadline or self.patience.request)
        try:
            while not work.done():
                left = limit - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(
                        f"{what}: the service at {self.base_url} has not answered within "
                        f"{deadline or self.patience.request:g} s (service.timeout). {RESUME}"
                    )
                await asyncio.wait({work}, timeout=min(left, LOOK_SECONDS))
                if not work.done():
                    await self._look(what)
            return work.result()
        except (self.sdk.TinkerError, ValueError, RuntimeError, OSError) as error:
            raise self._explained(what, error) from error
        finally:
            if not work.done():
                work.cancel()

    async def _settle(self, make: Callable[[], Any], blocks: bool) -> Any:
        value = await _on_a_thread(make) if blocks else make()
        if hasattr(value, "result_async"):
            return await value.result_async()
        return await asyncio.wrap_future(value) if isinstance(value, Future) else value

    async def _look(self, what: str) -> None:
        """Raises EngineError when the service has been away for too long."""
        now = time.monotonic()
        with self._lock:
            if now - self._looked < LOOK_SECONDS / 2:
                return
            self._looked = now
        why = await self._trouble()
        if why is None:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > self.patience.outage:
            raise EngineError(
                f"{what}: the service at {self.base_url} has been away for "
                f"{self.patience.outage:g} s ({why}). Start it again. {RESUME}"
            )

    async def _trouble(self) -> str | None:
        """Why the service cannot be reached; None if it can."""
        try:
            async with httpx.AsyncClient(timeout=LOOK_SECONDS) as client:
                await client.get(f"{self.base_url}/api/v1/healthz")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return str(error) or type(error).__name__
        return None

    def _explained(self, what: str, error: Exception) -> Exception:
        status = getattr(error, "status_code", None)
        said = _said(error)
        if status in (401, 403) or "api_key" in said or "API key" in said:
            return ConfigError(
                f"The service at {self.base_url} refuses the key: {said} Put the right one into "
                "the environment variable that service.api_key_env names."
            )
        hint = RESUME if "restarted" in said or "poisoned" in said else ""
        kind = Refused if _is_refusal(error) else EngineError
        return kind(f"{what}: the service at {self.base_url} says: {said} {hint}".rstrip())


def _is_refusal(error: Exception) -> bool:
    """Whether the fault is the request's: at once (4xx), or later, where a future failed."""
    status = getattr(error, "status_code", None)
    return status in (400, 422) or str(getattr(error, "category", "")).lower() == "user"


def _said(error: Exception) -> str:
    """The service's own words, where the error has them; and what first went wrong."""
    first: BaseException = error
    while isinstance(first, RuntimeError) and first.__cause__ is not None:
        first = first.__cause__
    body = getattr(first, "body", None)
    if isinstance(body, dict) and "detail" in body:
        return str(body["detail"])
    return str(first) or type(first).__name__


async def _on_a_thread(make: Callable[[], Any]) -> Any:
    """Not asyncio's own threads, for which a closing loop waits."""
    done: Future[Any] = Future()

    def work() -> None:
        try:
            done.set_result(make())
        except BaseException as error:  # handed over to who waits
            done.set_exception(error)

    threading.Thread(target=work, name="astuner-tinker", daemon=True).start()
    return await asyncio.wrap_future(done)


def _sdk() -> Any:
    try:
        import tinker
    except ImportError as error:
        raise MissingDependency("tinker", "tinker", "The tinker backbone") from error
    return tinker
