"""Sharded checkpoints become plain models with the right numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from transformers import AutoModelForCausalLM

from astuner.backbone.verl.merge import joined, merge, plain_names
from astuner.errors import CheckpointError


@dataclass
class Piece:
    """What one rank holds of a distributed tensor."""

    local: Tensor
    placements: tuple[Any, ...]
    mesh: Tensor

    @property
    def device_mesh(self) -> SimpleNamespace:
        return SimpleNamespace(mesh=self.mesh)

    def to_local(self) -> Tensor:
        return self.local


def test_shards_are_joined_where_they_were_cut() -> None:
    mesh = torch.tensor([0, 1])
    rows = [Piece(torch.tensor([[1.0, 2.0]]), (Shard(0),), mesh) for _ in range(2)]
    rows[1].local = torch.tensor([[3.0, 4.0]])
    columns = [Piece(torch.tensor([[float(i)], [9.0]]), (Shard(1),), mesh) for i in range(2)]
    same = [Piece(torch.tensor([7.0]), (Replicate(),), mesh) for _ in range(2)]
    plain = torch.tensor([5.0])
    whole = joined([{"r": rows[i], "c": columns[i], "s": same[i], "p": plain} for i in range(2)])
    assert whole["r"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert whole["c"].tolist() == [[0.0, 1.0], [9.0, 9.0]]
    assert (whole["s"].tolist(), whole["p"].tolist()) == ([7.0], [5.0])


def test_replicas_count_once() -> None:
    mesh = torch.tensor([[0, 1], [2, 3]])
    ranks = [
        {"w": Piece(torch.tensor([float(i % 2)]), (Replicate(), Shard(0)), mesh)} for i in range(4)
    ]
    assert joined(ranks)["w"].tolist() == [0.0, 1.0]


def test_lora_is_multiplied_in() -> None:
    name = "base_model.model.model.layers.0.q_proj"
    state = {
        f"{name}.base_layer.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        f"{name}.base_layer.bias": torch.tensor([3.0, 3.0]),
        f"{name}.lora_A.default.weight": torch.tensor([[1.0, 2.0]]),
        f"{name}.lora_B.default.weight": torch.tensor([[10.0], [100.0]]),
        "base_model.model.lm_head.weight": torch.tensor([[4.0]]),
    }
    plain = {name: value.tolist() for name, value in plain_names(state, 0.5).items()}
    assert plain == {
        "model.layers.0.q_proj.weight": [[6.0, 10.0], [50.0, 101.0]],
        "model.layers.0.q_proj.bias": [3.0, 3.0],
        "lm_head.weight": [[4.0]],
    }


def save_shards(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    torch.save(state, folder / "model_world_size_1_rank_0.pt")
    return folder


def test_the_merged_folder_is_the_trained_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    lora: Any = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    )
    shards = save_shards(tmp_path / "actor", lora.state_dict())
    (shards / "lora_train_meta.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    merged: Any = AutoModelForCausalLM.from_pretrained(
        merge(shards, tiny_model_dir, tmp_path / "model")
    )
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected, got = lora(ids).logits, merged(ids).logits
        base: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(ids).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, base, atol=1e-2)
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    shards = save_shards(tmp_path / "actor", {"lm_head.weight": torch.zeros(1, 1)})
    with pytest.raises(CheckpointError, match="does not fit the base model"):
        merge(shards, tiny_model_dir, tmp_path / "model")
    torch.save({"a": torch.zeros(1)}, shards / "model_world_size_1_rank_0.pt")
    with pytest.raises(CheckpointError, match="does not fit the base model"):
        merge(shards, tiny_model_dir, tmp_path / "model")
    (shards / "model_world_size_1_rank_0.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        merge(shards, tiny_model_dir, tmp_path / "model")
    (shards / "fsdp_config.json").write_text('{"world_')
    with pytest.raises(CheckpointError, match="cannot be read"):
        merge(shards, tiny_model_dir, tmp_path / "model")
    assert not (tmp_path / "model").exists()
