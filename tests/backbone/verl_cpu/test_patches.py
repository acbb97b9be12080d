"""For each patch: what verl does without it, and with it.

A test that fails in its first half says that verl no longer needs the patch: delete it.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("verl")

from torch import distributed
from verl.plugin.platform import platform_manager

from astuner.backbone.verl_cpu.patches import PATCHES, Patch, apply
from astuner.backbone.verl_cpu.platform import PlatformCPU

pytestmark = [pytest.mark.verl, pytest.mark.timeout(60)]


def patch_of(attribute: str) -> Patch:
    return next(patch for patch in PATCHES if patch.attribute == attribute)


def original_of(patch: Patch) -> Any:
    """As verl has it: this process never asked for the plugin."""
    return getattr(import_module(patch.module), patch.attribute)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform_manager, "_current_platform", PlatformCPU())


@pytest.fixture
def group(cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, made by verl's patched function."""
    monkeypatch.setenv("DIST_INIT_METHOD", f"file://{tmp_path}/store")
    patch = patch_of("initialize_global_process_group_ray")
    patch.replace(original_of(patch))(timeout_second=20)
    yield
    distributed.destroy_process_group()


def sharded(offload: Any = None) -> Any:
    """A module as verl's FSDP engine builds it (workers/engine/fsdp/transformer_impl.py:450)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = torch.nn.Linear(3, 2)
    mesh = init_device_mesh("cpu", (1,))
    extra = {"offload_policy": offload} if offload is not None else {}
    return fully_shard(module, mesh=mesh, **extra)


def test_gloo_is_named_once(cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_INIT_METHOD", f"file://{tmp_path}/store")
    patch = patch_of("initialize_global_process_group_ray")
    with pytest.raises(ValueError, match="Duplicate device type cpu"):
        original_of(patch)(timeout_second=20)
    assert not distributed.is_initialized()
    patch.replace(original_of(patch))(timeout_second=20)
    assert distributed.get_backend() == "cpu:gloo"
    distributed.destroy_process_group()


def test_the_old_policys_snapshot_is_a_copy(group: None) -> None:
    patch = patch_of("fsdp2_sharded_save_to_cpu")
    module = sharded()
    before = module.weight.full_tensor().clone()
    alias, _ = original_of(patch)(module)
    copy, _ = patch.replace(original_of(patch))(module)
    with torch.no_grad():
        module.weight.add_(1.0)
    assert torch.equal(alias["weight"][0], before + 1)  # the snapshot went on training
    assert torch.equal(copy["weight"][0], before)


def test_a_reference_policy_needs_no_pinned_memory(group: None) -> None:
    patch = patch_of("CPUOffloadPolicy")
    with pytest.raises((RuntimeError, AssertionError)):
        sharded(original_of(patch)(pin_memory=True))(torch.ones(1, 3))
    module = sharded(patch.replace(original_of(patch))(pin_memory=True))
    assert module(torch.ones(1, 3)).shape == (1, 2)


def test_a_merged_lora_is_not_rounded(group: None, tiny_model_dir: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    patch = patch_of("FSDPEngine")
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    spec = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    model: Any = get_peft_model(base, spec)
    lora = model.base_model.model.model.layers[0].self_attn.q_proj
    product = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    expected = before[(name := "model.layers.0.self_attn.q_proj.weight")] + 2 * product.detach()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    engine = SimpleNamespace(module=model, _is_offload_param=False)

    rounded = dict(original_of(patch)._merged_lora_per_tensor_param(engine))
    assert rounded[name].dtype == torch.bfloat16
    copy = type("Copy", (), {"__module__": patch.module})
    exact = dict(patch.replace(copy)._merged_lora_per_tensor_param(engine))
    assert set(exact) == set(before) == set(rounded)
    assert torch.allclose(exact[name], expected, atol=1e-6)
    assert not torch.allclose(rounded[name].float(), expected, atol=1e-6)
    assert torch.equal(exact["lm_head.weight"], before["lm_head.weight"])
    assert torch.equal(lora.base_layer.weight.full_tensor(), before[name])  # undone


def test_a_log_line_may_be_flushed(caplog: pytest.LogCaptureFixture) -> None:
    patch = patch_of("logger")
    trainer = import_module(patch.module).PPOTrainerSeparateAsync
    assert "flush=True" in inspect.getsource(trainer._setup)
    logger = original_of(patch)
    with pytest.raises(TypeError, match="flush"):
        logger.info("hello", flush=True)
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(caplog.handler)
    patch.replace(logger).info("hello", flush=True)
    logger.removeHandler(caplog.handler)
    assert "hello" in caplog.messages


def test_verls_own_variable_picks_the_fsdp_engine(
    cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from verl.workers.engine import EngineRegistry

    monkeypatch.delenv("VERL_ENGINE_DEVICE", raising=False)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        EngineRegistry.get_engine_cls("language_model", "fsdp2")
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    chosen = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    assert chosen.__name__ == "FSDPEngineWithLMHead"


def test_a_checkpoints_random_state_comes_back(cpu: None) -> None:
    from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

    assert not hasattr(torch.cpu, "set_rng_state")  # what the platform's module adds
    state = BaseCheckpointManager.get_rng_state()
    first = torch.rand(3)
    BaseCheckpointManager.load_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_patches_take_effect_before_anybody_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "patched_one.py").write_text("def f(): return 1\n")
    (tmp_path / "patched_two.py").write_text("from patched_one import f\nvalue = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    two = Patch("patched_two", "value", "", "", lambda value: value + 1)
    one = Patch("patched_one", "f", "", "", lambda f: lambda: f() + 1)
    apply([two, one])
    module = import_module("patched_two")
    assert (module.f(), module.value) == (2, 2)
    apply([two])  # it is imported already
    assert module.value == 3


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.attribute)
def test_each_patch_names_a_line_of_the_installed_verl(patch: Patch) -> None:
    import verl

    file, _, numbers = patch.line.partition(":")
    source = (Path(verl.__file__).parent.parent / file).read_text().splitlines()
    words = {
        "initialize_global_process_group_ray": "cpu:gloo,",
        "fsdp2_sharded_save_to_cpu": ".detach().cpu()",
        "CPUOffloadPolicy": "CPUOffloadPolicy(pin_memory=True)",
        "FSDPEngine": ".to(torch.bfloat16",
        "logger": "flush=True",
    }
    for number in numbers.split(" and "):
        assert words[patch.attribute] in source[int(number) - 1]
