"""Puts the rooms together for one run on one machine: model, proxy, runner, rollout.

Everything that `local`, `debug` and evaluation share. What is opened here is
closed when the context manager ends, in reverse order. No training in here.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from astuner.algorithm import find_kl, find_loss
from astuner.backbone.context import RunContext
from astuner.chat import ChatCodec, load_codec
from astuner.config.schema import AstunerConfig
from astuner.config.targets import targets_of
from astuner.engine.model_source import resolve_model
from astuner.engine.protocol import Engine, LoraSpec
from astuner.engine.team import Team
from astuner.env import open_environments
from astuner.errors import DataError
from astuner.loading import load_object
from astuner.model_tuner import ProxyServer, SessionSampling, TunerServer, Upstream
from astuner.task_judge import Judge, make_judge, wrap_judge
from astuner.task_reader import TaskSplits, read_tasks
from astuner.task_rollout import Rollout, RolloutSettings
from astuner.task_runner import EpisodeRunner, RunnerSettings
from astuner.types import Episode

if TYPE_CHECKING:
    from astuner.engine.embedded.model import EmbeddedModel


@dataclass(frozen=True)
class UserParts:
    """What the user brought: workflow, judge and tasks."""

    workflow: type
    judge: Judge | None
    tasks: TaskSplits


def user_parts(context: RunContext) -> UserParts:
    """Load them, so that a mistake in any shows before a model is loaded.

    Raises LoadingError, UserCodeError or DataError.
    """
    config = context.config
    workflow = context.workflow or load_object(
        config.rollout.user_workflow, "rollout.user_workflow"
    )
    judge = make_judge(config.task_judge) if context.judge is None else wrap_judge(context.judge)
    tasks = context.tasks or read_tasks(config.task_reader, config.seed)
    if not tasks.train:
        raise DataError("The dataset has no training tasks; give at least one.")
    return UserParts(workflow, judge, tasks)


def open_model(config: AstunerConfig) -> EmbeddedModel:
    """The embedded model that the configuration describes; the caller closes it."""
    from astuner.engine.embedded.model import EmbeddedModel  # torch: not for every run

    lora = config.model.lora
    rollout, trainer = config.rollout, config.trainer_common
    return EmbeddedModel.open(
        resolve_model(config.model.path),
        device=config.model.device,
        dtype=config.model.dtype,
        lora=LoraSpec(lora.rank, lora.alpha, lora.target_modules) if lora.enable else None,
        max_context=max_context(config),
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_tokens=rollout.kv_cache_tokens,
        micro_batch_tokens=trainer.micro_batch_tokens,
        gradient_checkpointing=trainer.gradient_checkpointing,
        seed=config.seed,
        losses=find_loss,
        kls=find_kl,
    )


def open_codec(config: AstunerConfig, tokenizer: Any) -> ChatCodec:
    return load_codec(
        tokenizer,
        renderer=config.model.renderer,
        template_kwargs=config.model.template_kwargs,
        model_name=config.model.path,
    )


def max_context(config: AstunerConfig) -> int:
    """Tokens of the longest episode; the engine takes the smaller of it and the model's own."""
    lengths = config.data
    return config.rollout.max_model_len or lengths.max_prompt_length + lengths.max_response_length


@dataclass(frozen=True)
class Workbench:
    """Everything that runs episodes."""

    server: ProxyServer
    runner: EpisodeRunner
    rollout: Rollout


@contextmanager
def workbench(
    config: AstunerConfig,
    parts: UserParts,
    server: ProxyServer,
    *,
    version: Callable[[], int] = lambda: 0,
    in_caller_thread: bool = False,
    on_episode: Callable[[Episode], None] | None = None,
    settings: RolloutSettings | None = None,
) -> Generator[Workbench]:
    """Start the proxy and what stands on it; close both at the end. `settings` take the place
    of the configuration's, e.g. where several processes share its limits."""
    with ExitStack() as stack:
        stack.enter_context(_loaded_for_good())
        server.start()
        stack.callback(server.close)
        limits = runner_settings(config, in_caller_thread=in_caller_thread)
        environments = open_environments(config)
        if environments is not None:
            stack.callback(environments.close)
        runner = EpisodeRunner(parts.workflow, parts.judge, server, limits, environments)
        stack.callback(runner.close)
        rollout = Rollout(runner, settings or rollout_settings(config), version, on_episode)
        yield Workbench(server, runner, rollout)


@contextmanager
def _loaded_for_good() -> Generator[None]:
    """What is loaded by now stays till the end: it is kept from the garbage collector, which
    would look through all of it (with torch and transformers half a million objects) every
    few steps, while engine and episodes wait."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def open_server(config: AstunerConfig, engine: Engine, codec: ChatCodec) -> TunerServer:
    return TunerServer(
        engine,
        codec,
        model_name=config.model.path,
        host=config.model_tuner.host,
        port=config.model_tuner.port,
        call_timeout=config.rollout.call_timeout,
        engines=engine.players if isinstance(engine, Team) else None,
        endpoints=upstreams(config),
    )


def upstreams(config: AstunerConfig) -> dict[str, Upstream]:
    """Target tag -> the endpoint that answers it."""
    return {
        tag: Upstream(e.base_url, e.model, os.environ.get(e.api_key_env, ""))
        for tag, e in ((t.tag, t.endpoint) for t in targets_of(config).values())
        if e is not None
    }


def runner_settings(config: AstunerConfig, *, in_caller_thread: bool = False) -> RunnerSettings:
    data, rollout = config.data, config.rollout
    return RunnerSettings(
        episode_timeout=rollout.episode_timeout,
        judge_timeout=rollout.judge_timeout,
        max_prompt_tokens=data.max_prompt_length,
        max_total_tokens=data.max_prompt_length + data.max_response_length,
        max_calls_per_agent=rollout.multi_turn.max_steps,
        merge=config.context_tracker.merge,
        named_targets={tag: t.kind == "own" for tag, t in targets_of(config).items()},
        in_caller_thread=in_caller_thread,
    )


def rollout_settings(config: AstunerConfig) -> RolloutSettings:
    rollout, val = config.rollout, config.rollout.val_kwargs
    tokens = rollout.max_response_length_in_one_turn
    return RolloutSettings(
        sampling=sampling(rollout.temperature, rollout.top_p, rollout.top_k, tokens),
        val_sampling=sampling(val.temperature, val.top_p, val.top_k, tokens),
        num_repeat=rollout.num_repeat,
        val_num_repeat=val.num_repeat,
        val_max_tasks=val.max_tasks,
        max_env_worker=rollout.max_env_worker,
        max_retries=rollout.max_retries,
        seed=config.seed,
        fail_fast_groups=min(config.data.train_batch_size, 8),
    )


def sampling(temperature: float, top_p: float, top_k: int, max_tokens: int) -> SessionSampling:
    return SessionSampling(
        temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, override=True
    )
