"""Opens the `Worker` of a process: the job read, the proxy started, the limits shared out.

What is opened is closed by the caller's ExitStack. No verl in here: its configuration
comes as it is, and its client of the rollout servers as an object that answers.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from astuner.backbone.assembly import UserParts, open_server, rollout_settings, workbench
from astuner.backbone.spawned.files import read_job, sign_of_life
from astuner.backbone.verl.engine import Client, VerlEngine
from astuner.backbone.verl.worker import Worker
from astuner.chat import load_codec
from astuner.config.schema import AstunerConfig
from astuner.task_rollout import RolloutSettings, Watchdog
from astuner.types import Episode

UNSEEDED = ("vllm", "sglang", "trtllm")
"""Rollout engines that are not given a seed for each call (see `VerlEngine`)."""
WATCHDOG_SECONDS = 60.0


def open_worker(
    folder: Path,
    verl: Any,
    client: Client,
    tokenizer: Any,
    loop: asyncio.AbstractEventLoop,
    stack: ExitStack,
) -> Worker:
    """Read the job and start the proxy, to be closed by `stack`. Blocks for a while.

    `loop` is the one that `client` lives on. Raises AstunerError.
    """
    job = read_job(folder)
    rollout = verl.actor_rollout_ref.rollout
    config = with_fewer_environments(job.config, rollout.agent.num_workers)
    codec = load_codec(
        tokenizer,
        renderer=config.model.renderer,
        template_kwargs=config.model.template_kwargs,
        model_name=config.model.path,
    )
    engine = VerlEngine(
        client,
        loop,
        max_context=rollout.max_model_len or rollout.prompt_length + rollout.response_length,
        seeded=rollout.name not in UNSEEDED,
        on_answer=partial(sign_of_life, folder, "a call was answered"),
    )

    def ended(episode: Episode) -> None:
        sign_of_life(folder, f"episode {episode.episode_id} ended")

    bench = stack.enter_context(
        workbench(
            config,
            UserParts(job.workflow, job.judge, job.tasks),
            open_server(config, engine, codec),
            version=lambda: engine.version,
            on_episode=ended,
            settings=share(config, rollout),
        )
    )
    stack.enter_context(
        Watchdog(lambda: bench.runner.live, lambda: engine.answers, after=WATCHDOG_SECONDS)
    )
    return Worker(folder, job, bench, engine, verl)


def with_fewer_environments(config: AstunerConfig, workers: int) -> AstunerConfig:
    """With one worker's share of the environments that may exist at once."""
    instances = ceil(config.env.max_instances / workers)
    return replace(config, env=replace(config.env, max_instances=instances))


def share(config: AstunerConfig, rollout: Any) -> RolloutSettings:
    """One worker's share of the limits. Group size and sampling are those of verl's own
    configuration (`rollout`), which a raw override may have changed, and which training
    divides its logits by."""
    whole, workers = rollout_settings(config), rollout.agent.num_workers
    val = rollout.val_kwargs
    limit = whole.fail_fast_groups
    return replace(
        whole,
        sampling=replace(
            whole.sampling,
            temperature=float(rollout.temperature),
            top_p=float(rollout.top_p),
            top_k=max(0, int(rollout.top_k)),
        ),
        val_sampling=replace(
            whole.val_sampling,
            temperature=float(val.temperature),
            top_p=float(val.top_p),
            top_k=max(0, int(val.top_k)),
        ),
        num_repeat=int(rollout.n),
        val_num_repeat=int(val.n),
        max_env_worker=ceil(whole.max_env_worker / workers),
        # One failing task alone must not end a run, however many workers there are.
        fail_fast_groups=min(limit, max(2, ceil(limit / workers))),
    )
