"""Adapters on a base: drawn as PEFT draws, active one at a time, ranks and targets apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from astuner.engine.embedded.adapters import Adapter, LoraLayers
from astuner.engine.embedded.peft_format import read_adapter, write_adapter
from astuner.engine.protocol import LoraSpec
from astuner.errors import CheckpointError, ModelError

from .test_learner import plain_logits
from .tiny import VOCAB, tiny_model

pytestmark = pytest.mark.timeout(60)
IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


@pytest.fixture
def layers() -> LoraLayers:
    return LoraLayers(tiny_model())


def filled(layers: LoraLayers, spec: LoraSpec, seed: int) -> Adapter:
    """An adapter that changes something."""
    adapter = layers.new(spec, seed)
    adapter.flat.copy_(torch.randn(adapter.shape.size, generator=torch.manual_seed(seed)) * 0.2)
    return adapter


def logits(layers: LoraLayers, adapter: Adapter | None) -> torch.Tensor:
    with torch.no_grad():
        return plain_logits(layers.activate(adapter), IDS).clone()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_is_drawn_as_peft_draws_it(family: str) -> None:
    model: Any = tiny_model()
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB))
    mine = LoraLayers(copy.deepcopy(model)).new(LoraSpec(rank=4, alpha=8), seed=5)
    torch.manual_seed(5)
    peft = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    theirs = {
        n.removeprefix("base_model.model.").replace(".default.", "."): p
        for n, p in peft.named_parameters()
        if ".lora_" in n
    }
    assert list(theirs) == list(mine.parameters)
    assert all(torch.equal(p, mine.parameters[n]) for n, p in theirs.items())


def test_a_new_adapter_changes_nothing_and_a_filled_one_does(layers: LoraLayers) -> None:
    base = logits(layers, None)
    assert torch.equal(base, logits(layers, layers.new(LoraSpec(rank=2), 0)))
    filled_one = filled(layers, LoraSpec(rank=2), 0)
    assert (logits(layers, filled_one) - base).abs().max() > 0.1
    assert torch.equal(base, logits(layers, None))


def test_adapters_of_other_ranks_and_targets_take_turns(layers: LoraLayers, tmp_path: Path) -> None:
    specs = [
        LoraSpec(rank=2, alpha=4),
        LoraSpec(rank=5, alpha=3, target_modules="q_proj,v_proj"),
        LoraSpec(rank=1, alpha=7, target_modules=["mlp", "unembed"]),
    ]
    adapters = [filled(layers, spec, seed) for seed, spec in enumerate(specs)]
    first = [logits(layers, a) for a in adapters]
    for turn in (2, 0, 1, 1, 0, 2):
        assert torch.equal(logits(layers, adapters[turn]), first[turn])
    for number, adapter in enumerate(adapters):  # what PEFT computes from the files
        folder = tmp_path / str(number)
        folder.mkdir()
        write_adapter(folder, adapter.shape, adapter.parameters, base=Path("x"), transposed=False)
        plain = PeftModel.from_pretrained(tiny_model(attention="sdpa"), str(folder))
        torch.testing.assert_close(plain(IDS).logits[0], first[number], atol=1e-4, rtol=1e-4)
        shape, values = read_adapter(folder, layers)
        assert shape == adapter.shape
        assert all(torch.equal(values[n], p) for n, p in adapter.parameters.items())


def test_targets_by_part_and_by_name(layers: LoraLayers) -> None:
    def kinds(wanted: str | list[str]) -> set[str]:
        shape = layers.shape(LoraSpec(target_modules=wanted))
        return {t.name.rsplit(".", 1)[-1] for t in shape.targets}

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert kinds("attn") == attention
    assert kinds("mlp") == mlp
    assert kinds("all-linear") == attention | mlp
    assert kinds(["all-linear", "unembed"]) == attention | mlp | {"lm_head"}
    assert kinds("lm_head, q_proj") == {"lm_head", "q_proj"}
    with pytest.raises(ModelError, match=r"no linear layer 'nonsense'.*down_proj"):
        kinds("nonsense")
    with pytest.raises(ModelError, match="at least 1; it is 0"):
        layers.shape(LoraSpec(rank=0))


def test_a_copy_stays_as_it_is(layers: LoraLayers) -> None:
    adapter = filled(layers, LoraSpec(rank=2), 0)
    frozen, before = adapter.copy(), logits(layers, adapter)
    adapter.flat.mul_(2)
    assert torch.equal(logits(layers, frozen), before)
    assert not torch.equal(logits(layers, adapter), before)
    assert not any(p.requires_grad for p in frozen.parameters.values())


def test_moving_keeps_the_parameters_and_what_they_hold(layers: LoraLayers) -> None:
    adapter = filled(layers, LoraSpec(rank=2), 0)
    before, objects = logits(layers, adapter), list(adapter.parameters.values())
    adapter.flat = adapter.flat.clone()  # the old memory is another's now
    for parameter in objects:
        parameter.data = torch.full_like(parameter, torch.nan)
    with torch.inference_mode():  # as between two ticks of the sampler
        adapter.move(torch.device("cpu"))
    assert torch.equal(logits(layers, adapter), before)
    plain_logits(layers.activate(adapter), IDS).sum().backward()
    assert all(p.grad is not None for p in objects)


def test_gradients_reach_the_active_adapter_alone(layers: LoraLayers) -> None:
    one, other = (filled(layers, LoraSpec(rank=2), seed) for seed in (0, 1))
    plain_logits(layers.activate(one), IDS).sum().backward()
    assert all(p.grad is not None for p in one.parameters.values())
    assert all(p.grad is None for p in other.parameters.values())
    assert all(p.grad is None for p in layers.model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('"use_dora": false -> "use_dora": true', "not a plain LoRA adapter: use_dora"),
        ('"peft_type": "LORA" -> "peft_type": "IA3"', "not a plain LoRA adapter: IA3"),
        ('"r": 2 -> "r": 3', "does not fit the model"),
        ('"r": 2 -> "r": "x"', "no adapter that can be read"),
    ],
)
def test_files_that_are_no_adapter_of_this_model(
    layers: LoraLayers, tmp_path: Path, change: str, message: str
) -> None:
    adapter = filled(layers, LoraSpec(rank=2), 0)
    write_adapter(tmp_path, adapter.shape, adapter.parameters, base=Path("x"), transposed=False)
    config = tmp_path / "adapter_config.json"
    old, new = change.split(" -> ")
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, layers)
    with pytest.raises(CheckpointError, match="no adapter that can be read"):
        read_adapter(tmp_path / "nowhere", layers)
