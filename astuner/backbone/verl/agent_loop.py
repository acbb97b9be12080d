"""The agent loop that verl runs: one instance per episode, one `Worker` per process.

verl's AgentLoopWorker makes an `EpisodeLoop` for each session, with its client of the
rollout servers, and puts what `run` returns into its TransferQueue. Everything that knows
episodes is in `worker`; here rows only become verl's outputs.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from verl.experimental.agent_loop.agent_loop import (  # pyright: ignore[reportMissingImports]
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
)

from astuner.backbone.spawned.files import folder_of_process, give_up
from astuner.backbone.verl.opening import open_worker
from astuner.backbone.verl.outputs import Row
from astuner.backbone.verl.worker import Asked, Worker


class EpisodeOutput(AgentLoopOutput):  # pyright: ignore[reportUntypedBaseClass]
    """An output with a score for every response token."""

    token_scores: list[float]

    def as_dict(self) -> dict[str, Any]:
        """verl puts the whole reward on the last token; here the scores replace it."""
        output = super().as_dict()
        output["rm_scores"] = torch.tensor(output.pop("token_scores"), dtype=torch.float32)
        return output


class EpisodeLoop(AgentLoopBase):  # pyright: ignore[reportUntypedBaseClass]
    """One session of a row of `dataset`."""

    def __init__(self, trainer_config: Any, server_manager: Any, tokenizer: Any, **_: Any) -> None:
        """verl's own constructor is left out: it makes a chat-template helper for each
        episode, which we never ask and which does not know every template."""
        self.config = trainer_config.config
        self.server_manager = server_manager
        self.tokenizer = tokenizer

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> list[EpisodeOutput]:
        """One output per timeline; none for a failed episode.

        `sampling_params` are those of verl's configuration, which the worker has as well.
        Raises GroupDropped where verl should replace the whole row.
        """
        worker = await _worker(self.config, self.server_manager, self.tokenizer)
        asked = Asked(
            uid=str(row["uid"]),
            session=int(row["session_id"]),
            split=str(row["split"]),
            index=int(row["index"]),
            position=int(row["position"]),
            step=int(row["global_steps"]),
        )
        return [to_output(r) for r in await worker.session(asked)]


def to_output(row: Row) -> EpisodeOutput:
    """With the same fields set in every row, as TransferQueue's columns need."""
    oldest, newest = row.versions
    return EpisodeOutput(
        prompt_ids=row.prompt_ids,
        response_ids=row.response_ids,
        response_mask=row.response_mask,
        response_logprobs=row.logprobs,
        reward_score=row.reward,
        token_scores=row.scores,
        num_turns=row.num_turns,
        metrics=AgentLoopMetrics(generate_sequences=row.seconds),
        extra_fields={
            "min_global_steps": oldest,
            "max_global_steps": newest,
            "global_steps": newest,
            "reward_extra_info": dict(row.info),
        },
    )


# ---------------------------------------------------------------- one worker a process

_opened: dict[Path, asyncio.Task[Worker]] = {}
_stack = ExitStack()
"""Never closed: verl just ends the process."""


async def _worker(config: Any, client: Any, tokenizer: Any) -> Worker:
    """This process's worker; the first episode opens it, on the loop that verl runs us on."""
    folder = folder_of_process()
    if folder not in _opened:
        loop = asyncio.get_running_loop()
        opening = asyncio.to_thread(open_worker, folder, config, client, tokenizer, loop, _stack)
        _opened[folder] = task = asyncio.create_task(opening)
        task.add_done_callback(_tell_failure)
    return await asyncio.shield(_opened[folder])


def _tell_failure(task: asyncio.Task[Worker]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        give_up(folder_of_process(), error)
