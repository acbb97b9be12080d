"""The `debug` backbone: a few episodes, one after the other, shown token by token.

By default workflow and judge run in the calling thread, so that an IDE's breakpoint
stops there; proxy and model have threads of their own and keep answering. The model
is the embedded one, any OpenAI-compatible endpoint, or a script. Nothing is trained:
`debug.train_step` computes loss and gradient norm and throws them away.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.text import Text

from astuner.backbone.assembly import (
    UserParts,
    open_codec,
    open_model,
    open_server,
    upstreams,
    user_parts,
    workbench,
)
from astuner.backbone.context import RunContext, RunResult
from astuner.backbone.targets import check_targets
from astuner.chat.protocol import ChatCodec
from astuner.config.schema import AstunerConfig
from astuner.engine.protocol import AdamParams, Policy
from astuner.errors import ConfigError
from astuner.model_tuner import ProxyServer
from astuner.task_rollout import Place, Rollout
from astuner.task_runner.workflow import declared_targets
from astuner.tracking import colored_tokens, legend, write_summary
from astuner.trainer import TrainSettings
from astuner.trainer.batch import make_batch
from astuner.types import Call, Episode, Group, Sample


@dataclass(frozen=True)
class DebugModel:
    """What answers the calls; policy and codec only where there are tokens."""

    server: ProxyServer
    policy: Policy | None = None
    codec: ChatCodec | None = None


async def run(context: RunContext) -> RunResult:
    """Run the first tasks and print each episode. Raises AstunerError."""
    config, console = context.config, Console()
    with ExitStack() as stack:
        parts = user_parts(context)
        check_targets(config, declared_targets(parts.workflow))
        model = _open(stack, config)
        alone = config.debug.debug_max_parallel == 1
        settings = replace_parallel(config)
        bench = stack.enter_context(
            workbench(settings, parts, model.server, in_caller_thread=alone)
        )
        console.print(legend())
        groups = await _groups(config, parts, bench.rollout, model, console, alone=alone)
        step = await _train_step(config, groups, model, console)
    episodes = [e for g in groups for e in g.episodes]
    summary = _summary(context, episodes, step)
    write_summary(context.run_dir, summary)
    return RunResult(context.run_dir, summary, None)


def replace_parallel(config: AstunerConfig) -> AstunerConfig:
    """The configuration with the debug section's own numbers where the rollout reads them."""
    rollout = replace(
        config.rollout,
        num_repeat=config.debug.num_repeat,
        max_env_worker=config.debug.debug_max_parallel,
        max_retries=0,
    )
    return replace(config, rollout=rollout)


def _open(stack: ExitStack, config: AstunerConfig) -> DebugModel:
    kind = config.debug.model
    if kind == "embedded":
        model = open_model(config)
        stack.callback(model.close)
        codec = open_codec(config, model.tokenizer)
        return DebugModel(open_server(config, model, codec), model, codec)
    if config.debug.train_step:
        raise ConfigError(f"debug.train_step needs debug.model=embedded, not {kind!r}.")
    if kind == "endpoint":
        return DebugModel(_relay(config))
    from astuner.chat.byte_codec import ByteCodec
    from astuner.engine.fake import FakeEngine

    codec = ByteCodec()
    stop = codec.stop_token_ids[0]
    replies = [[*codec.encode(reply).tolist(), stop] for reply in config.debug.fake_replies]
    engine = FakeEngine(replies, max_context=1_000_000)
    return DebugModel(open_server(config, engine, codec), codec=codec)


def _relay(config: AstunerConfig) -> ProxyServer:
    from astuner.model_tuner import RelayServer

    endpoint = config.debug.endpoint
    return RelayServer(
        endpoint.base_url,
        endpoint.model,
        os.environ.get(endpoint.api_key_env, ""),
        host=config.model_tuner.host,
        port=config.model_tuner.port,
        call_timeout=config.rollout.call_timeout,
        others=upstreams(config),
    )


# ---------------------------------------------------------------- running and showing


async def _groups(
    config: AstunerConfig,
    parts: UserParts,
    rollout: Rollout,
    model: DebugModel,
    console: Console,
    *,
    alone: bool,
) -> list[Group]:
    """One group a task; in order when alone, so that the output reads like a story."""
    tasks = parts.tasks.train[: config.debug.debug_first_n_tasks]
    rollout.on_episode = lambda episode: show_episode(console, episode, model.codec)
    if alone:
        return [await rollout.group(task, Place(0, i)) for i, task in enumerate(tasks)]
    return list(
        await asyncio.gather(*(rollout.group(task, Place(0, i)) for i, task in enumerate(tasks)))
    )


def show_episode(console: Console, episode: Episode, codec: ChatCodec | None) -> None:
    """Print its outcome and its timelines."""
    console.rule(f"episode {episode.episode_id}  task {episode.task.task_id}")
    console.print(Text(episode.task.main_query, "bold"))
    if episode.failure is not None:
        console.print(Text(f"failed ({episode.failure.kind}): {episode.failure.message}", "red"))
        console.print(Text(episode.failure.traceback, "dim"))
    else:
        seconds = episode.ended_at - episode.started_at
        console.print(
            f"reward [green]{episode.reward}[/]  success {episode.is_success}  "
            f"calls {len(episode.calls)}  timelines {len(episode.samples)}  {seconds:.1f} s"
        )
    for sample in episode.samples:
        if codec is not None and len(sample.token_ids):
            _show_sample(console, sample, episode.calls, codec)
    if codec is None or not episode.samples:
        for call in episode.calls:
            console.print(Text(f"> {call.response.get('content')}"))


def _show_sample(console: Console, sample: Sample, calls: Sequence[Call], codec: ChatCodec) -> None:
    turns = sorted(set(sample.spans[:, 2].tolist()))
    began = calls[turns[0]].new_timeline_reason if turns else None
    masked = ", ".join(f"{n} {reason}" for reason, n in sample.masked.items() if n)
    console.print(
        Text(
            f"timeline of agent {sample.agent_name} (new because: {began or 'forked'}): "
            f"{sample.num_trained} trained, {masked}",
            "dim",
        )
    )

    def decode(ids: Sequence[int]) -> str:
        return codec.decode(ids, skip_special=False)

    console.print(colored_tokens(sample, decode, logprobs=True))


# ---------------------------------------------------------------- the step that is thrown away


async def _train_step(
    config: AstunerConfig, groups: Sequence[Group], model: DebugModel, console: Console
) -> dict[str, float]:
    if not config.debug.train_step or model.policy is None:
        return {}
    settings = TrainSettings.from_config(config, steps_per_epoch=1)
    batch = make_batch(groups, replace(settings, mini_batch_num=1))
    if not batch.mini_batches:
        skipped = ", ".join(f"{n} {reason}" for reason, n in batch.skipped_groups.items())
        console.print(
            f"No training step: nothing to learn from ({skipped}). Groups need episodes with "
            "different rewards: try debug.num_repeat=8."
        )
        return {}
    result = await model.policy.forward_backward(batch.mini_batches[0], settings.loss)
    step = await model.policy.optim_step(AdamParams(lr=0.0))
    console.print(
        f"training step (thrown away): loss {result.loss:.5f}  grad norm {step['grad_norm']:.5f}"
    )
    return {"loss": result.loss, "grad_norm": step["grad_norm"]}


def _summary(
    context: RunContext, episodes: Sequence[Episode], step: dict[str, float]
) -> dict[str, Any]:
    rewards = [e.reward for e in episodes if e.ok and e.reward is not None]
    return {
        "backbone": "debug",
        "model": context.config.debug.model,
        "episodes": len(episodes),
        "episodes_failed": sum(not e.ok for e in episodes),
        "mean_reward": sum(rewards) / len(rewards) if rewards else None,
        "train_step": step or None,
        "run_dir": str(context.run_dir),
    }
