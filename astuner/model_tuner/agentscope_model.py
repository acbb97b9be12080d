"""AgentScope's OpenAIChatModel, pointed at the proxy.

AgentScope 1.0.x takes a name, a key and client arguments; 2.x takes a credential.
The model object is theirs, so agents, tools and formatters work as ever. Retries
are switched off: what fails is counted and retried by the run.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from astuner.errors import MissingDependency

if TYPE_CHECKING:
    from astuner.model_tuner.tuner import OpenAIEndpoint


def agentscope_model(
    endpoint: OpenAIEndpoint, *, stream: bool, http_client: Any, context_size: int
) -> Any:
    """An OpenAIChatModel of whichever AgentScope is installed, over `http_client`.
    `context_size` in tokens. Raises MissingDependency."""
    try:
        from agentscope.model import OpenAIChatModel  # pyright: ignore
    except ModuleNotFoundError as error:
        if error.name != "agentscope":
            raise
        raise MissingDependency(
            "agentscope", "agentscope", "tuner.as_agentscope_model()"
        ) from error
    names = inspect.signature(OpenAIChatModel).parameters
    client = {"http_client": http_client, "max_retries": 0}
    if "credential" in names:
        from agentscope.credential import OpenAICredential  # pyright: ignore

        return OpenAIChatModel(
            credential=OpenAICredential(api_key=endpoint.api_key, base_url=endpoint.base_url),
            model=endpoint.model,
            stream=stream,
            max_retries=0,
            context_size=context_size,
            client_kwargs=client,
        )
    # 1.0.x renamed the argument on its way.
    client_argument = "client_kwargs" if "client_kwargs" in names else "client_args"
    arguments = {client_argument: {"base_url": endpoint.base_url, **client}}
    return OpenAIChatModel(
        model_name=endpoint.model, api_key=endpoint.api_key, stream=stream, **arguments
    )
