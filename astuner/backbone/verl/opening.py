"""Opens the `Worker` of a process: the job read, the proxy started, the limits shared out.

What is opened is closed by the caller's ExitStack. No verl in here: its configuration
comes as it is, and its client of the rollout servers as an object that answers.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from astuner.backbone.assembly import rollout_settings
from astuner.backbone.spawned.bench import open_bench
from astuner.backbone.spawned.files import read_job, sign_of_life
from astuner.backbone.verl.engine import Client, VerlEngine
from astuner.backbone.verl.worker import Worker
from astuner.config.schema import AstunerConfig
from astuner.task_rollout import RolloutSettings

UNSEEDED = ("vllm", "sglang", "trtllm")
"""Rollout engines that are not given a seed for each call (see `VerlEngine`)."""


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
    engine = VerlEngine(
        client,
        loop,
        max_context=rollout.max_model_len or rollout.prompt_length + rollout.response_length,
        seeded=rollout.name not in UNSEEDED,
        on_answer=partial(sign_of_life, folder, "a call was answered"),
    )

    bench = open_bench(
        folder,
        job,
        engine,
        tokenizer,
        stack,
        processes=rollout.agent.num_workers,
        settings=as_verl_samples(job.config, rollout),
    )
    return Worker(folder, job, bench, engine, verl)


def as_verl_samples(config: AstunerConfig, rollout: Any) -> RolloutSettings:
    """Group size and sampling are those of verl's own configuration (`rollout`), which a raw
    override may have changed, and which training divides its logits by."""
    whole, val = rollout_settings(config), rollout.val_kwargs
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
    )
