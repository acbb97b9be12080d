"""What a workflow is handed: the ways to call the model that is being tuned.

A base URL with a key for any framework, the openai and anthropic SDKs' own clients, and
AgentScope's own model object, for which the tuner itself may also stand. All of them
lead to the same recorded calls; which agent is speaking, and whether it is trained, is
in the key.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from astuner.errors import MissingDependency
from astuner.model_tuner.session import Session

if TYPE_CHECKING:
    from anthropic import Anthropic, AsyncAnthropic
    from openai import AsyncOpenAI, OpenAI

C = TypeVar("C")
IN_PROCESS_URL = "http://astuner.in-process/v1"
GRACE_SECONDS = 30.0
"""Clients wait this much longer than the proxy, so that its error reaches them."""


@dataclass(frozen=True, slots=True)
class OpenAIEndpoint:
    """What an OpenAI-compatible client needs."""

    base_url: str
    api_key: str
    model: str


@dataclass(frozen=True, slots=True)
class AnthropicEndpoint:
    """What a client of Anthropic's Messages API needs."""

    base_url: str
    """Without /v1, which these clients add themselves."""
    api_key: str
    model: str


class ModelTuner:
    """The model under tuning, as one episode's workflow sees it."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def episode_id(self) -> str:
        return self._session.spec.episode_id

    @property
    def model_name(self) -> str:
        return self._session.server.model_name

    def as_oai_baseurl_apikey(
        self, agent_name: str = "default", target_tag: str = "default"
    ) -> OpenAIEndpoint:
        """`.base_url`, `.api_key` and `.model` for any OpenAI-compatible client.

        `target_tag` is matched with the workflow's `trainable_targets`. The same
        arguments give the same key, which dies with the episode."""
        agent = self._session.agent(agent_name, target_tag)
        base_url = self._session.server.base_url_of(self._session)
        return OpenAIEndpoint(base_url, agent.api_key, self.model_name)

    @overload
    def as_raw_openai_sdk_client(
        self,
        agent_name: str = "default",
        target_tag: str = "default",
        *,
        sync: Literal[False] = False,
    ) -> AsyncOpenAI: ...

    @overload
    def as_raw_openai_sdk_client(
        self, agent_name: str = "default", target_tag: str = "default", *, sync: Literal[True]
    ) -> OpenAI: ...

    def as_raw_openai_sdk_client(
        self, agent_name: str = "default", target_tag: str = "default", *, sync: bool = False
    ) -> AsyncOpenAI | OpenAI:
        """The openai SDK's client: async ones call the proxy in process, without a
        socket; sync ones over loopback. They do not retry: what fails here is counted
        and retried by the run."""
        import openai

        if sync:
            endpoint = self.as_oai_baseurl_apikey(agent_name, target_tag)
            return openai.OpenAI(
                base_url=endpoint.base_url,
                api_key=endpoint.api_key,
                max_retries=0,
                timeout=self._session.server.call_timeout + GRACE_SECONDS,
            )
        client = openai.AsyncOpenAI(
            base_url=IN_PROCESS_URL,
            api_key=self._session.agent(agent_name, target_tag).api_key,
            max_retries=0,
            http_client=self._in_process(),
        )
        return _without_platform(client)

    def _in_process(self) -> Any:
        """For the openai SDK, which takes httpx clients, though the type it names is its
        successor's. Not bound to an event loop, and nothing to close."""
        import httpx

        from astuner.model_tuner.in_process import InProcessTransport

        transport: Any = InProcessTransport(self._session.server.app)
        return httpx.AsyncClient(transport=transport)

    def as_anthropic_baseurl_apikey(
        self, agent_name: str = "default", target_tag: str = "default"
    ) -> AnthropicEndpoint:
        """`.base_url`, `.api_key` and `.model` for any client of Anthropic's Messages API."""
        endpoint = self.as_oai_baseurl_apikey(agent_name, target_tag)
        return AnthropicEndpoint(
            endpoint.base_url.removesuffix("/v1"), endpoint.api_key, endpoint.model
        )

    @overload
    def as_raw_anthropic_sdk_client(
        self,
        agent_name: str = "default",
        target_tag: str = "default",
        *,
        sync: Literal[False] = False,
    ) -> AsyncAnthropic: ...

    @overload
    def as_raw_anthropic_sdk_client(
        self, agent_name: str = "default", target_tag: str = "default", *, sync: Literal[True]
    ) -> Anthropic: ...

    def as_raw_anthropic_sdk_client(
        self, agent_name: str = "default", target_tag: str = "default", *, sync: bool = False
    ) -> AsyncAnthropic | Anthropic:
        """The anthropic SDK's client, as `as_raw_openai_sdk_client` gives the openai SDK's.
        Raises MissingDependency without it."""
        try:
            import anthropic
        except ModuleNotFoundError as error:
            if error.name != "anthropic":
                raise
            why = "tuner.as_raw_anthropic_sdk_client()"
            raise MissingDependency("anthropic", "anthropic", why) from error
        if sync:
            endpoint = self.as_anthropic_baseurl_apikey(agent_name, target_tag)
            return anthropic.Anthropic(
                base_url=endpoint.base_url,
                api_key=endpoint.api_key,
                max_retries=0,
                timeout=self._session.server.call_timeout + GRACE_SECONDS,
            )
        from astuner.model_tuner.in_process import InProcessTransport

        # The SDK insists on a client of the library it is built on: httpx, or its successor.
        library = anthropic.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]
        transport: Any = InProcessTransport(self._session.server.app, import_module(library))
        client = anthropic.AsyncAnthropic(
            base_url=IN_PROCESS_URL.removesuffix("/v1"),
            api_key=self._session.agent(agent_name, target_tag).api_key,
            max_retries=0,
            http_client=anthropic.DefaultAsyncHttpxClient(transport=transport),
        )
        return _without_platform(client)

    def as_agentscope_model(
        self,
        agent_name: str = "default",
        target_tag: str = "default",
        debug_model: Any = None,
        *,
        stream: bool = False,
    ) -> Any:
        """AgentScope's own OpenAIChatModel (1.0.x or 2.x, whichever is installed), calling the
        proxy in process, without a socket.

        `debug_model` is returned instead for a target that is not trained, e.g. a strong
        model that plays the user. Raises MissingDependency without AgentScope."""
        if debug_model is not None and not self.is_trainable(target_tag):
            return debug_model
        from astuner.model_tuner.agentscope_model import agentscope_model

        server = self._session.server
        key = self._session.agent(agent_name, target_tag).api_key
        return agentscope_model(
            OpenAIEndpoint(IN_PROCESS_URL, key, self.model_name),
            stream=stream,
            http_client=self._in_process(),
            context_size=server.max_context,
        )

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As AgentScope calls its models, so that `ReActAgent(model=tuner)` works.

        It is then `as_agentscope_model()`, with the default agent and target."""
        return await self._agentscope_model(*args, **kwargs)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Whatever else AgentScope asks of a model (`stream`, `formatter`, ...)."""
            if name.startswith("_") or "agentscope" not in sys.modules:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return getattr(self._agentscope_model, name)

    @cached_property
    def _agentscope_model(self) -> Any:
        return self.as_agentscope_model()

    def is_trainable(self, target_tag: str) -> bool:
        """Whether calls of this target are trained."""
        spec = self._session.spec
        if target_tag in spec.untrained_targets:
            return False
        return spec.trainable_targets is None or target_tag in spec.trainable_targets


def _without_platform(client: C) -> C:
    """Keeps a client of either SDK from asking, in a thread, what machine this is, which each
    would do before its first call, to tell it in a header that nobody here reads."""
    setattr(client, "_platform", "Unknown")  # noqa: B010 - their own, and not public
    return client
