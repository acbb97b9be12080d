"""Merging: the folder's logits are the adapter's, and other tools find all they need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from astuner.engine.embedded.export import merge
from astuner.engine.embedded.weights import LoraSpec
from astuner.errors import CheckpointError

from .test_learner import group, one_step
from .tiny import tiny_model
from .tiny_training import learner, load_tiny, save_tiny

pytestmark = pytest.mark.timeout(60)

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base")


def checkpoint(base: Path, folder: Path, lora: LoraSpec | None) -> Path:
    mine = learner(load_tiny(base, lora=lora))
    one_step(mine, group())
    mine.save(folder, optimizer=True)
    return folder


def test_merged_logits_are_those_of_the_adapter(base: Path, tmp_path: Path) -> None:
    saved = checkpoint(base, tmp_path / "run", LoraSpec(rank=4, alpha=8))
    to = merge(saved, base, tmp_path / "merged")
    tuned = PeftModel.from_pretrained(tiny_model(attention="sdpa"), str(saved))
    expected = tuned(input_ids=IDS).logits
    plain = tiny_model(attention="sdpa")(input_ids=IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(to, dtype="auto")
    assert merged.dtype == torch.float32
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_folder_is_whole_and_the_base_s_files_are_verbatim(base: Path, tmp_path: Path) -> None:
    to = merge(checkpoint(base, tmp_path / "run", LoraSpec(4, 8)), base, tmp_path / "merged")
    assert sorted(f.name for f in to.iterdir()) == sorted(f.name for f in base.iterdir())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (to / name).read_bytes() == (base / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(to)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    )


def test_a_bfloat16_base_gives_a_bfloat16_folder(base: Path, tmp_path: Path) -> None:
    tiny_model(dtype=torch.bfloat16).save_pretrained(base)
    saved = checkpoint(base, tmp_path / "run", LoraSpec(rank=4, alpha=8))
    to = merge(saved, base, tmp_path / "merged")
    assert json.loads((to / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(to, dtype="auto").dtype == torch.bfloat16


def test_full_weights_get_the_tokenizer(base: Path, tmp_path: Path) -> None:
    to = merge(checkpoint(base, tmp_path / "run", None), base, tmp_path / "merged")
    assert sorted(f.name for f in to.iterdir()) == sorted(f.name for f in base.iterdir())
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "run")(input_ids=IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(to)
    assert torch.equal(merged(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_output_embedding(tmp_path: Path, tied: bool) -> None:
    base = save_tiny(tmp_path / "base")
    if tied:
        model = tiny_model(tie_word_embeddings=True)
        model.save_pretrained(base)
    saved = checkpoint(base, tmp_path / "run", LoraSpec(4, 8, target_modules=["unembed"]))
    if tied:
        with pytest.raises(CheckpointError, match="input embedding as well"):
            merge(saved, base, tmp_path / "merged")
        return
    tuned = PeftModel.from_pretrained(tiny_model(attention="sdpa"), str(saved))
    merged = AutoModelForCausalLM.from_pretrained(merge(saved, base, tmp_path / "merged"))
    expected = tuned(input_ids=IDS).logits
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    saved = checkpoint(base, tmp_path / "run", LoraSpec(rank=4, alpha=8))
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        merge(saved, base, base)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        merge(tmp_path / "nowhere", base, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="cannot be merged into"):
        merge(saved, tmp_path / "nowhere", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
