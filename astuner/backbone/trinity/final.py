"""The validation after the last step, which Trinity's explorer does not make
(explorer/explorer.py:289): by the launcher, over the run's service, while it still listens.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from astuner.backbone.assembly import UserParts, max_context, open_server, workbench
from astuner.backbone.trinity.engine import Answer, TrinityEngine, sampled
from astuner.chat import load_codec
from astuner.config.schema import AstunerConfig
from astuner.engine.protocol import SamplingParams
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
    key), as they are after this step. Raises as a rollout does."""
    sampler = FixedSampler(await _sampling_client(service, state_path), step)
    loop = asyncio.get_running_loop()
    engine = TrinityEngine(sampler, loop, max_context=max_context(config))
    engine.version = step
    with ExitStack() as stack:
        codec = await asyncio.to_thread(_codec, config, model)
        server = open_server(config, engine, codec)
        bench = stack.enter_context(
            workbench(config, parts, server, version=lambda: engine.version)
        )
        return await bench.rollout.evaluate(parts.tasks.validation, step)


async def _sampling_client(service: tuple[str, str], state_path: str) -> Any:
    import tinker  # pyright: ignore[reportMissingImports]

    url, key = service
    client = await asyncio.to_thread(tinker.ServiceClient, base_url=url, api_key=key)
    training = await client.create_training_client_from_state(state_path)
    return await training.save_weights_and_get_sampling_client()


def _codec(config: AstunerConfig, model: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return load_codec(
        tokenizer,
        renderer=config.model.renderer,
        template_kwargs=config.model.template_kwargs,
        model_name=config.model.path,
    )
