"""verl's own vLLM server and replica, with the worker that keeps its weights."""

from __future__ import annotations

from typing import Any

from astuner.backbone.verl_cpu import vllm_cpu  # isort: skip  # before vLLM

import ray  # pyright: ignore[reportMissingImports]
from verl.workers.rollout.vllm_rollout.vllm_async_server import (  # pyright: ignore[reportMissingImports]
    vLLMHttpServer,
    vLLMReplica,
)


class CpuVLLMHttpServer(vLLMHttpServer):  # pyright: ignore[reportUntypedBaseClass]
    """verl's hook for another worker class."""

    def _get_worker_extension_cls(self) -> str:
        extension = vllm_cpu.CpuWorkerExtension
        return f"{extension.__module__}.{extension.__qualname__}"


class CpuVLLMReplica(vLLMReplica):  # pyright: ignore[reportUntypedBaseClass]
    """Starts that server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(CpuVLLMHttpServer)
