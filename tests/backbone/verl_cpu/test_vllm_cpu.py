"""What verl and vllm-cpu do without our changes, and with them."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.verl, pytest.mark.verl_vllm, pytest.mark.timeout(120)]


@pytest.fixture
def ours() -> Any:
    pytest.importorskip("vllm")
    from astuner.backbone.verl_cpu import vllm_cpu

    return vllm_cpu


def test_verl_sees_a_vllm(ours: Any) -> None:
    from verl.workers.rollout import vllm_rollout

    assert vllm_rollout.vllm_package_version == version("vllm-cpu") + "+cpu"
    assert issubclass(ours.ServerAdapter, vllm_rollout.ServerAdapter)


def test_the_worker_keeps_its_weights(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    def linear() -> torch.nn.Linear:
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        return layer

    monkeypatch.setattr(_custom_ops, "_supports_onednn", True)
    assert linear().weight.numel() == 0  # nothing is left to load new weights into
    ours.keep_weights()
    layer: Any = linear()
    assert layer.weight.shape == (32, 64)
    layer.weight.copy_(torch.ones(32, 64))
    assert torch.equal(
        layer.cpu_linear(torch.ones(1, 64), layer.weight, None)[0], 64 * torch.ones(32)
    )


async def test_a_silent_worker_ends_the_weight_update(
    ours: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl.plugin.platform import platform_manager
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    from astuner.backbone.verl_cpu.platform import PlatformCPU
    from astuner.errors import DeadlineExceeded

    monkeypatch.setattr(platform_manager, "_current_platform", PlatformCPU())
    assert "self.socket.recv()" in inspect.getsource(BucketedWeightSender)
    assert receive_timeout() == -1  # for ever

    async def update_weights(self: Any, **_: Any) -> None:
        sender = BucketedWeightSender(f"ipc://{tmp_path}/s", bucket_size_mb=1, use_shm=True)
        await sender.async_send_weights(iter([("x", torch.ones(3))]))

    monkeypatch.setattr(ours.VerlServerAdapter, "update_weights", update_weights)
    monkeypatch.setattr(ours, "BUCKET_SECONDS", 0.1)
    adapter = object.__new__(ours.ServerAdapter)
    with pytest.raises(DeadlineExceeded, match="Weight sync of step 3: vLLM's worker"):
        await adapter.update_weights(global_steps=3)
    assert receive_timeout() == -1


def receive_timeout() -> int:
    """Of a new socket, in milliseconds."""
    import zmq

    with zmq.Context.instance().socket(zmq.REQ) as socket:
        return socket.getsockopt(zmq.RCVTIMEO)
