"""verl's own pieces around the agent loop, with scripted rollout servers behind its client."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transfer_queue as tq  # type: ignore[import-not-found]
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-not-found]
from verl.trainer.ppo.utils import (  # type: ignore[import-not-found]
    create_rl_dataset,
    create_rl_sampler,
)
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync  # type: ignore[import-not-found]
from verl.utils.dataset.rl_dataset import collate_fn  # type: ignore[import-not-found]
from verl.workers.rollout.llm_server import LLMServerClient  # type: ignore[import-not-found]
from verl.workers.rollout.replica import TokenOutput  # type: ignore[import-not-found]

from astuner.backbone.spawned.choices import Facts
from astuner.backbone.verl.compose import compose
from astuner.backbone.verl.driver import with_loop
from astuner.backbone.verl.sections import TRAIN_FILES, VALIDATION_FILES
from astuner.backbone.verl.translate import to_verl
from astuner.config.schema import AstunerConfig
from tests.backbone.verl.verl_world import OK, job_config


class Servers(LLMServerClient):
    """Says "ok" to everything; nothing is behind it, and it goes into an actor whole."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, None)

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        versions = {"global_steps": 4, "min_global_steps": 4, "max_global_steps": 4}
        return TokenOutput(
            token_ids=OK,
            log_probs=[-0.25, -0.5, -0.75],
            stop_reason="completed",
            extra_fields=versions,
        )


def our_config(model: Path, **rollout: Any) -> AstunerConfig:
    config = job_config()
    config.backbone, config.model.path = "verl", str(model)
    config.rollout.num_repeat = 3
    config.task_reader.shuffle = False
    config.trainer_common.total_steps = 2
    for key, value in rollout.items():
        setattr(config.rollout, key, value)
    return config


def verls_config(config: AstunerConfig, folder: Path, **more: Any) -> Any:
    """As the driver composes it, with verl keys (dots written as two underscores) on top."""
    settings = to_verl(config, run_dir=folder, device="cpu", facts=Facts(validation=True))
    settings = with_loop(folder, settings)
    settings |= {key.replace("__", "."): value for key, value in more.items()}
    return compose(settings, validate=False)


def trainer(config: Any, manager: Any, tokenizer: Any) -> Any:
    """verl's trainer, as far as it feeds the agent loops and computes advantages: its own
    methods on its own loaders and buffer, without workers."""
    self = object.__new__(PPOTrainerSync)
    mode = config.trainer.v1.trainer_mode
    self.config, self.trainer_mode, self.global_steps = config, mode, 1
    self.agent_loop_manager, self.tokenizer = manager, tokenizer
    self.train_dataloader_it = None
    self.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
    config.data.gen_batch_size = 1
    for split, files in (("train", TRAIN_FILES), ("val", VALIDATION_FILES)):
        dataset = create_rl_dataset(files, config.data, tokenizer, None)
        loader = StatefulDataLoader(
            dataset=dataset,
            batch_size=1 if split == "train" else len(dataset),
            collate_fn=collate_fn,
            sampler=create_rl_sampler(config.data, dataset),
        )
        setattr(self, f"{split}_dataloader", loader)
    self.replay_buffer = self._build_replay_buffer()
    self.replay_buffer.poll_interval = 0.1
    return self


def rows_of(meta: Any) -> dict[str, dict[str, Any]]:
    """What TransferQueue holds of a sampled batch: "POSITION/SESSION/TIMELINE" -> fields."""
    data = tq.kv_batch_get(keys=meta.keys, partition_id=meta.partition_id)
    columns = {name: list(data[name]) for name in data.keys()}  # noqa: SIM118
    rows: dict[str, dict[str, Any]] = {}
    for n, key in enumerate(meta.keys):
        row = {name: _plain(column[n]) for name, column in columns.items()}
        _, session, timeline = key.rsplit("_", 2)
        rows[f"{row['position']}/{session}/{timeline}"] = row
    return rows


def _plain(value: Any) -> Any:
    value = getattr(value, "data", value) if type(value).__name__ == "NonTensorData" else value
    return value.tolist() if hasattr(value, "tolist") else value
