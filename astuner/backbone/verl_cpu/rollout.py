"""The rollout server as verl's engine "embedded": an actor, its replica, its adapter.

    EmbeddedReplica   starts the actor, in the trainer's or in its own process group
    EmbeddedActor     `RolloutServer` with the names of methods that verl calls
    EmbeddedAdapter   lives beside the trainer (or the receiving end of the weight sync) and
                      hands the actor all weights after each update, in a memory file

Everything of one replica is on one machine. Serves no HTTP.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
import torch
from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
    NodeAffinitySchedulingStrategy,
)
from verl.workers.rollout.base import BaseRollout  # pyright: ignore[reportMissingImports]
from verl.workers.rollout.replica import (  # pyright: ignore[reportMissingImports]
    RolloutReplica,
    TokenOutput,
)
from verl.workers.rollout.utils import (  # pyright: ignore[reportMissingImports]
    ensure_async_iterator,
)

from astuner.backbone.verl_cpu import ROLLOUT
from astuner.backbone.verl_cpu.memory_file import MemoryFile, machine
from astuner.backbone.verl_cpu.server import Limits, RolloutServer
from astuner.backbone.verl_cpu.waits import SYNC_SECONDS, answer
from astuner.engine.embedded.received import open_received, write_weights
from astuner.errors import ConfigError

START_SECONDS = 600.0
"""For loading the model, from a slow disk too."""


class EmbeddedActor:
    """An actor of Ray. What verl calls and a CPU has no use for does nothing."""

    def __init__(self, path: str, settings: Mapping[str, Any], limits: Limits) -> None:
        torch.set_num_threads(settings["threads"])
        model = open_received(
            path,
            device="cpu",
            dtype=settings["dtype"],
            max_context=settings["max_context"],
            max_num_seqs=settings["max_num_seqs"],
            kv_cache_tokens=settings["kv_cache_tokens"],
        )
        self._model = model
        self._server = RolloutServer(model, limits)

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: object = None,
        video_data: object = None,
    ) -> Any:
        """verl's TokenOutput."""
        if image_data or video_data:
            raise ConfigError("The embedded rollout server has no vision; set rollout.engine: vllm")
        reply = await self._server.generate(prompt_ids, sampling_params)
        return TokenOutput(
            token_ids=reply.token_ids,
            log_probs=reply.logprobs,
            stop_reason="completed" if reply.stop_reason == "stop" else reply.stop_reason,
            extra_fields={
                "global_steps": reply.version,
                "num_cached_tokens": reply.prefill_cached,
            },
        )

    async def about(self) -> dict[str, Any]:
        """Where it runs and what it has done, for tests and people."""
        stats = self._model.stats()
        return {
            "machine": machine(),
            "version": self._model.version,
            "sampled_tokens": stats.sampled_tokens,
            "threads": torch.get_num_threads(),
        }

    async def update_weights(self, weights: str) -> int:
        return await self._server.update(Path(weights))

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        return {"aborted_count": await self._server.pause(reject=reject_request)}

    async def resume_generation(self) -> None:
        await self._server.resume()

    async def shutdown(self) -> None:
        self._server.close()

    # The KV is dropped with each update, and no memory is lent to anybody.
    async def wake_up(self, tags: object = None) -> None: ...
    async def sleep(self) -> None: ...
    async def clear_kv_cache(self) -> None: ...
    async def release_kv_cache(self) -> None: ...
    async def resume_kv_cache(self) -> None: ...
    async def start_profile(self, **_: object) -> None: ...
    async def stop_profile(self) -> None: ...


class EmbeddedReplica(RolloutReplica):  # pyright: ignore[reportUntypedBaseClass]
    """One actor a replica, on the machine of its worker."""

    async def launch_servers(self) -> None:
        if self.world_size != 1:
            raise ConfigError(
                "actor_rollout_ref.rollout: the embedded rollout engine does not split a model; "
                "set tensor_model_parallel_size, data_parallel_size and "
                "pipeline_model_parallel_size to 1."
            )
        worker = self.workers[0]
        node = await answer(
            worker.__ray_call__.remote(_node),
            START_SECONDS,
            "the worker beside the rollout server to say where it is",
        )
        name = server_name(self.replica_rank)
        server = (
            ray.remote(EmbeddedActor)
            .options(
                name=name,
                num_cpus=0,
                max_concurrency=self.max_concurrency,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(*self._arguments())
        )
        await answer(server.about.remote(), START_SECONDS, f"{name} to load its model")
        self.servers = [server]
        self._server_handle, self._server_address = server, name

    def _arguments(self) -> tuple[str, dict[str, Any], Limits]:
        config, model = self.config, self.model_config
        own = dict((config.engine_kwargs or {}).get(ROLLOUT) or {})
        settings = {
            "threads": own.pop("threads", 0) or threads(self.gpus_per_node),
            "kv_cache_tokens": own.pop("kv_cache_tokens", 0),
            "dtype": config.dtype,
            "max_context": config.max_model_len or config.prompt_length + config.response_length,
            "max_num_seqs": config.max_num_seqs,
        }
        if own:
            raise ConfigError(
                f"actor_rollout_ref.rollout.engine_kwargs.{ROLLOUT}: unknown keys "
                f"{', '.join(own)}. It has threads and kv_cache_tokens."
            )
        path = getattr(model, "local_path", None) or model.path
        ends = frozenset[int]() if config.ignore_eos else end_tokens(path)
        return path, settings, Limits(config.prompt_length, config.response_length, ends)


class EmbeddedAdapter(BaseRollout):  # pyright: ignore[reportUntypedBaseClass]
    """The trainer's end: `update_weights` returns when the server has them."""

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        # As in verl's own adapters: rank is the replica's, as each has one worker.
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.is_leader_rank = True

    async def resume(self, tags: list[str]) -> None: ...
    async def release(self) -> None: ...

    async def update_weights(
        self,
        weights: Any,
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **_: Any,
    ) -> None:
        if wire_format != "named_tensors":
            raise ConfigError(
                f"checkpoint_engine: the embedded rollout engine takes whole weights, not "
                f"{wire_format!r}. Use the backend memory_file."
            )
        name = server_name(self.replica_rank)
        tensors = [pair async for pair in ensure_async_iterator(weights)]
        with MemoryFile(f"astuner-weights-{self.replica_rank}") as file:
            write_weights(file.path, tensors, global_steps or 0)
            del tensors
            server: Any = ray.get_actor(name)
            await answer(
                server.update_weights.remote(str(file.path)),
                SYNC_SECONDS,
                f"{name} to take the weights of step {global_steps}",
            )


def _node(_: Any) -> str:
    return ray.get_runtime_context().get_node_id()


def server_name(replica_rank: int) -> str:
    return f"{ROLLOUT}_server_{replica_rank}"


def threads(processes: int) -> int:
    """Threads of one of so many processes that compute at the same time here."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, processes))


def end_tokens(path: str) -> frozenset[int]:
    """The ids that end a reply according to the model's folder."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        ends: Any = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the folder has none
        ends = None
    if ends is None:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        ends = tokenizer.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
