"""The same run on `local` and over HTTP: the same episodes, logprobs, losses and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from astuner.job import TunedModel
from astuner.tracking import read_metrics
from tests.backbone.tinker.world import Running, remote_job
from tests.tiny_run import TwoTurns, tiny_job

SAME = ("reward/mean", "tokens/trained", "policy/loss", "policy/grad_norm", "policy/sampler_kl")


def metrics(runs: Path) -> list[dict[str, float]]:
    found = read_metrics(runs / "tiny" / "metrics.jsonl")
    return [m for m in found.values() if "policy/loss" in m]


@pytest.mark.timeout(300)
def test_the_same_run(service: Running, tiny_model_dir: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    mine = tiny_job(tiny_model_dir, here, TwoTurns, total_steps=3).tune()
    job = remote_job(service.url, tiny_model_dir, there, TwoTurns, total_steps=3)
    theirs = job.tune()
    ours, remote = metrics(here), metrics(there)
    assert len(ours) == len(remote) == 3
    for a, b in zip(ours, remote, strict=True):
        for name in SAME:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
    for name in ("eval_before", "eval_after", "tokens_sampled", "tokens_trained"):
        assert theirs.metrics[name] == pytest.approx(mine.metrics[name], abs=1e-6)
    a, b = load_file(adapter(mine)), load_file(adapter(theirs))
    assert a.keys() == b.keys()
    assert max(float(np.abs(a[k] - b[k]).max()) for k in a) < 1e-4
    question: Any = "say 1"
    assert theirs.chat(question, max_tokens=16) == mine.chat(question, max_tokens=16)
    mine.close()
    theirs.close()


def adapter(model: TunedModel) -> Path:
    config = json.loads((model.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    return model.path / "adapter_model.safetensors"
