"""The validation after the last step, which Trinity's explorer does not make
(explorer/explorer.py:289): by the launcher, over the run's service, while it still listens.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from astuner.backbone.assembly import UserParts, max_context, open_codec, open_server, workbench
from astuner.backbone.spawned.answers import Answer
from astuner.backbone.tinker.connection import Connection, Patience
from astuner.backbone.trinity.engine import TrinityEngine, sampled
from astuner.chat import ChatCodec
from astuner.config.schema import AstunerConfig
from astuner.engine.protocol import SamplingParams
from astuner.errors import BackboneError, DeadlineExceeded, EngineError
from astuner.types import Episode


class FixedSampler:
    """Of weights that do not change."""

    def __init__(self, client: Any, version: int) -> None:
        self._client = client
        self._version = version

    async def sample(self, prompt_ids: list[int], params: SamplingParams, limit: int) -> Answer:
        return await sampled(self._client, prompt_ids, params, limit, self._version)


async def validate(
    config: AstunerConfig,
    parts: UserParts,
    model: Path,
    service: tuple[str, str],
    state_path: str,
    step: int,
) -> list[Episode]:
    """Play the validation tasks with the weights of a training state of the service (its URL and
    key), as they are after this step. Raises as a rollout does, and BackboneError when the
    service does not give the weights within rollout.call_timeout."""
    patience = Patience(outage=config.rollout.call_timeout)
    connection = Connection(*service, patience)
    try:
        client = await _sampling_client(connection, state_path, config.rollout.call_timeout)
        return await _played(config, parts, model, FixedSampler(client, step), step)
    finally:
        await asyncio.to_thread(connection.close)


async def _played(
    config: AstunerConfig, parts: UserParts, model: Path, sampler: FixedSampler, step: int
) -> list[Episode]:
    loop = asyncio.get_running_loop()
    engine = TrinityEngine(sampler, loop, max_context=max_context(config))
    engine.version = step
    with ExitStack() as stack:
        server = open_server(config, engine, await asyncio.to_thread(_codec, config, model))
        bench = stack.enter_context(
            workbench(config, parts, server, version=lambda: engine.version)
        )
        return await bench.rollout.evaluate(parts.tasks.validation, step)


async def _sampling_client(connection: Connection, state_path: str, seconds: float) -> Any:
    """The SDK itself would ask a service that is gone for ever."""
    try:
        async with asyncio.timeout(seconds):
            await connection.open({})
            training = await connection.resume(state_path, optimizer=False)
            save = training.save_weights_and_get_sampling_client
            return await connection.ask("The sampler of the last weights", save)
    except (TimeoutError, DeadlineExceeded, EngineError) as error:
        raise BackboneError(
            f"The validation after the last step did not take place: the run's service at "
            f"{connection.base_url} has not given the weights {state_path} within {seconds:g} s "
            f"(rollout.call_timeout). {error}".rstrip()
        ) from error


def _codec(config: AstunerConfig, model: Path) -> ChatCodec:
    from transformers import AutoTokenizer

    return open_codec(config, AutoTokenizer.from_pretrained(model, local_files_only=True))
