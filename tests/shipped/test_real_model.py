"""The quickstart with the real model, for a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from astuner import TunedModel
from astuner.cli import main
from astuner.engine.model_source import resolve_model
from astuner.errors import ModelError
from astuner.tracking import read_metrics

from .artefacts import ROOT

KEYS = {
    "backbone", "model", "steps", "eval_before", "eval_after", "train_seconds",
    "tokens_sampled", "tokens_trained", "tokens_masked_by_reason", "run_dir",
}  # fmt: skip
QUESTION = (
    "State the final answer to the following arithmetic problem: 3 + 4 =\n"
    "Reply with just the number."
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_steps_of_the_quickstart(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        resolve_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"the model is not to be had here: {error}")
    arguments = ["--conf", str(ROOT / "configs" / "quickstart.yaml"), "--exp-dir", str(tmp_path)]
    small = ["trainer_common.total_steps=3", "rollout.val_kwargs.max_tasks=16"]
    assert main([*arguments, *small]) == 0
    run_dir = tmp_path / "quickstart"

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary.keys() >= KEYS
    assert summary["steps"] == 3
    assert summary["episodes"] == 3 * 8 * 16
    assert summary["episodes_failed"] == 0
    masked = summary["tokens_masked_by_reason"]
    untrained = sum(count for reason, count in masked.items() if reason != "context")
    assert summary["tokens_trained"] + untrained == summary["tokens_sampled"]
    assert masked["context"] > summary["tokens_sampled"]

    trained = [m for m in read_metrics(run_dir / "metrics.jsonl").values() if "policy/loss" in m]
    assert trained
    assert all(0 <= metrics["policy/sampler_kl"] < 0.05 for metrics in trained)

    tuned = TunedModel.load(run_dir)
    merged = tuned.merge(tmp_path / "merged")
    said = tuned.chat(QUESTION, max_tokens=4)
    tuned.close()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    plain = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.strip()
    assert said.strip() == plain.strip()
