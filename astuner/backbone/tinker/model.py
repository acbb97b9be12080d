"""What is tuned, when it is on a service: both necks in one object, and whether it fits us.

Checks before anything is sampled that the service has the model, that its tokenizer is
the one our chat template speaks, and how long its context is. The tokenizer is loaded
here; weights never are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from astuner.algorithm import find_kl, find_loss
from astuner.backbone.lora_parts import lora_parts
from astuner.backbone.tinker.connection import Connection, Offered
from astuner.backbone.tinker.engine import EngineStats, TinkerEngine
from astuner.backbone.tinker.policy import Adapter, TinkerPolicy
from astuner.config.schema import AstunerConfig
from astuner.engine.model_source import SMOLLM2, resolve_model
from astuner.engine.protocol import SamplingParams, TokenChunk
from astuner.errors import ConfigError, ModelError


class TinkerModel(TinkerPolicy):
    """An `Engine` and a `Policy`."""

    def __init__(
        self,
        connection: Connection,
        engine: TinkerEngine,
        adapter: Adapter,
        tokenizer: Any,
        *,
        in_turns: bool = False,
    ) -> None:
        super().__init__(
            connection, engine, adapter, losses=find_loss, kls=find_kl, in_turns=in_turns
        )
        self.max_context = engine.max_context
        self.tokenizer = tokenizer

    @property
    def version(self) -> int:
        return self.engine.version

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncIterator[TokenChunk]:
        """See `Engine.stream`."""
        return self.engine.stream(prompt_ids, params)

    async def check_tokenizer(self, note: Callable[[str], None]) -> None:
        """Once there is a training run. Raises ModelError when the service's is another one."""
        theirs = await self.tokenizer_id()
        if theirs is None:
            note("The service does not name its tokenizer: it is taken to be model.path's.")
        elif (same := same_tokenizer(self.tokenizer, theirs)) is None:
            note(f"The service's tokenizer {theirs} cannot be had here, so it is not compared.")
        elif not same:
            raise ModelError(
                f"The service's tokenizer is {theirs}, whose tokens are not those of model.path "
                f"({self.tokenizer.name_or_path}). Set model.path to the model that the service "
                f"has ({self.adapter.base_model})."
            )


async def open_model(config: AstunerConfig, connection: Connection) -> TinkerModel:
    """On an open connection. Raises ConfigError or ModelError."""
    offered = choose(await connection.models(), config)
    engine = TinkerEngine(
        connection,
        max_context=context_of(config, offered),
        call_timeout=config.rollout.call_timeout,
    )
    lora = config.model.lora
    adapter = Adapter(offered.name, lora.rank, config.seed, lora_parts(lora.target_modules))
    tokenizer = load_tokenizer(config.model.path)
    in_turns = config.rollout.max_staleness == 0
    return TinkerModel(connection, engine, adapter, tokenizer, in_turns=in_turns)


def choose(models: Sequence[Offered], config: AstunerConfig) -> Offered:
    """The configured one of the service's models. Raises ConfigError naming what there is."""
    wanted = config.service.base_model or config.model.path
    trainable = [model for model in models if model.trainable]
    for model in trainable:
        if model.name == wanted:
            return model
    if not config.service.base_model and len(trainable) == 1:
        return trainable[0]
    names = ", ".join(model.name for model in trainable) or "none"
    raise ConfigError(
        f"The service at {config.service.base_url} does not train {wanted!r}. Set "
        f"service.base_model to one of: {names}."
    )


def context_of(config: AstunerConfig, offered: Offered) -> int:
    """The smaller of what the configuration needs and the service has. Raises ConfigError
    when not even the longest first prompt fits."""
    lengths = config.data
    ours = config.rollout.max_model_len or lengths.max_prompt_length + lengths.max_response_length
    if offered.max_context is None:
        return ours
    if offered.max_context <= lengths.max_prompt_length:
        raise ConfigError(
            f"data.max_prompt_length is {lengths.max_prompt_length}, but the context of "
            f"{offered.name} at the service is {offered.max_context} tokens, and a reply has to "
            "fit in too. Lower it."
        )
    return min(ours, offered.max_context)


def load_tokenizer(path: str) -> Any:
    """That of a folder, "smollm2-135m" or a hub name; no weights are fetched for a hub name.
    Raises ModelError."""
    from transformers import AutoTokenizer

    folder = Path(path).expanduser()
    source = (
        str(resolve_model(path)) if path == SMOLLM2 else str(folder if folder.is_dir() else path)
    )
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path: {path!r} has no tokenizer that can be loaded ({error}). Give a folder "
            "or a hub name with the tokenizer and chat template of the service's model."
        ) from error


def same_tokenizer(ours: Any, theirs: str) -> bool | None:
    """Whether the tokenizer named `theirs` gives the same ids; None if it cannot be had."""
    if theirs == ours.name_or_path:
        return True
    from transformers import AutoTokenizer

    with suppress(OSError, ValueError):
        other: Any = AutoTokenizer.from_pretrained(theirs, local_files_only=True)
        return other.get_vocab() == ours.get_vocab()
    return None
