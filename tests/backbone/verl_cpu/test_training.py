"""verl's whole trainer on the CPU, from `AstunerJob.tune()` to the merged model.

Each test starts verl once or twice, which takes half a minute before the first step; so
they are few, and each looks at all that its runs show.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from astuner import AstunerJob, ModelTuner, WorkflowOutput, WorkflowTask
from astuner.engine.model_source import resolve_model
from astuner.tracking import read_episodes
from tests.tiny_run import TwoTurns, tiny_job

pytestmark = [pytest.mark.verl, pytest.mark.timeout(400), pytest.mark.xdist_group("ray")]
PROBABILITY_GAP = "verl/training/rollout_probs_diff_max"


def verl_job(model: Path, runs: Path, workflow: type = TwoTurns, **trainer: Any) -> AstunerJob:
    """2 groups of 4 episodes a step, each of two calls in one timeline."""
    job = tiny_job(model, runs, workflow, **trainer)
    job.config.backbone = "verl"
    job.config.trainer_common.device = "cpu"
    job.config.trainer_common.stall_timeout = 150
    return job


def steps_of(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of each training step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "policy/grad_norm" in line}


def versions(run: Path) -> dict[int, set[int]]:
    """The weights that sampled the trained tokens of each step."""
    seen: dict[int, set[int]] = {}
    for row in read_episodes(run).to_pylist():
        if row["split"] == "train":
            trained = np.array(row["weight_versions"])[np.array(row["loss_mask"], bool)]
            seen.setdefault(row["step"], set()).update(trained.tolist())
    return seen


def difference(a: Path, b: Path) -> float:
    """The largest change of any weight between two model folders of one architecture."""
    import torch
    from transformers import AutoModelForCausalLM

    one: Any = AutoModelForCausalLM.from_pretrained(a, dtype=torch.float32)
    two: Any = AutoModelForCausalLM.from_pretrained(b, dtype=torch.float32)
    pairs = zip(one.state_dict().items(), two.state_dict().values(), strict=True)
    return max((value - other).abs().max().item() for (_, value), other in pairs)


def check_steps(run: Path, last: int) -> None:
    metrics = steps_of(run)
    assert list(metrics) == list(range(1, last + 1))
    for step in metrics.values():
        assert step["policy/grad_norm"] > 0
        assert step["reward/std"] > 0
        assert step[PROBABILITY_GAP] < 1e-4


def test_sync_and_resume(tiny_model_dir: Path, tmp_path: Path) -> None:
    def tuned(total: int, *, resume: bool) -> Path:
        job = verl_job(tiny_model_dir, tmp_path, total_steps=total, save_freq=1)
        job.config.model.lora.enable = False
        job.config.trainer_common.use_kl_loss = True
        return job.tune(resume=resume).path

    run = tmp_path / "tiny"
    model = tuned(2, resume=False)
    assert model.parent == run
    check_steps(run, 2)
    assert versions(run) == {1: {0}, 2: {1}}  # each step by the weights of the one before
    after_two = difference(model, tiny_model_dir)
    assert after_two > 1e-3

    assert tuned(3, resume=True) == model
    check_steps(run, 3)
    drift = [step["policy/reference_kl"] for step in steps_of(run).values()]
    assert abs(drift[0]) < 1e-6 < drift[1] < drift[2], "the reference is the base model"
    assert versions(run) == {1: {0}, 2: {1}, 3: {2}}
    assert difference(model, tiny_model_dir) > after_two
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


class TwoTalks(TwoTurns):
    """Two timelines: a conversation of two calls, and another one of one call."""

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        alone: Any = [{"role": "user", "content": f"and {workflow_task.main_query}"}]
        await client.chat.completions.create(model="tuned", messages=alone)
        return await super().execute(workflow_task, tuner)


def groups(run: Path) -> dict[int, list[str]]:
    """The groups of each training step, with the number of their episodes."""
    rows = [row for row in read_episodes(run).to_pylist() if row["split"] == "train"]
    episodes = {(row["step"], row["group_id"], row["episode_id"]) for row in rows}
    assert len(rows) == 2 * len(episodes), "two timelines each"
    counts = Counter((step, group) for step, group, _ in episodes)
    assert set(counts.values()) == {4}
    return {step: sorted(g for at, g in counts if at == step) for step, _ in sorted(counts)}


def test_async_and_resume(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Rollouts in their own pool, ahead of the trainer by a step; a LoRA, which is merged
    for them after each step; episodes of two timelines. verl's checkpoint has groups that
    were finished and not trained: the resumed run trains on them, and they are counted."""

    def tuned(total: int, *, resume: bool) -> Path:
        job = verl_job(tiny_model_dir, tmp_path, TwoTalks, total_steps=total, save_freq=1)
        job.config.trainer_common.test_freq = 0
        job.config.trainer_common.val_before_train = False
        job.config.rollout.mode = "async"
        job.config.rollout.max_staleness = 1
        return job.tune(resume=resume).path

    run = tmp_path / "tiny"
    model = tuned(2, resume=False)
    after_two = difference(model, tiny_model_dir)
    assert after_two > 1e-3
    assert list((run / "verl" / "spool").glob("*.group")), "rollouts were ahead"

    assert tuned(4, resume=True) == model
    metrics = steps_of(run)
    assert list(metrics) == [1, 2, 3, 4]
    for step, values in metrics.items():
        assert values["policy/grad_norm"] > 0 and values["reward/std"] > 0
        assert values["verl/sync/bytes"] > 0, step
        assert values["groups/trained"] == 2
    trained = [group for of_step in groups(run).values() for group in of_step]
    assert sorted(trained) == [f"s{n // 2 + 1:05d}-t{n % 2:03d}" for n in range(8)]
    seen = versions(run)
    assert seen[1] == {0}
    for step in (2, 3, 4):
        assert seen[step] <= {step - 2, step - 1}, "no staler than allowed"
    assert max(seen[4]) >= 2, "the rollouts' weights advance"
    assert metrics[1][PROBABILITY_GAP] < 1e-4, "both have the same weights"
    trained_rows = [row for row in read_episodes(run).to_pylist() if row["split"] == "train"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens_trained"] == sum(sum(row["loss_mask"]) for row in trained_rows)
    assert (summary["steps"], summary["episodes"]) == (4, 32)
    assert difference(model, tiny_model_dir) > after_two


def real_job(model: Path, runs: Path) -> AstunerJob:
    """Two steps of 2 groups of 2 short episodes, of a model whose probabilities mean something."""
    job = verl_job(model, runs, total_steps=2, test_freq=0, val_before_train=False)
    job.config.rollout.num_repeat = 2
    job.config.rollout.max_response_length_in_one_turn = 12
    job.config.trainer_common.optim.lr = 1e-3
    job.config.trainer_common.stall_timeout = 400
    return job


def check_real(run: Path) -> None:
    """Trainer and rollout compute the same probabilities, also from new weights."""
    metrics = steps_of(run)
    assert list(metrics) == [1, 2]
    assert versions(run) == {1: {0}, 2: {1}}
    assert metrics[1]["policy/grad_norm"] > 0
    assert max(step[PROBABILITY_GAP] for step in metrics.values()) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rollout_and_trainer_agree_on_a_real_model(tmp_path: Path) -> None:
    base = resolve_model("smollm2-135m")
    model = real_job(base, tmp_path).tune().path
    check_real(tmp_path / "tiny")
    assert difference(model, base) > 1e-4  # the weights of step 2 were others


@pytest.mark.slow
@pytest.mark.verl_vllm
@pytest.mark.timeout(900)
def test_vllm_for_cpus_agrees_too(tmp_path: Path) -> None:
    base = resolve_model("smollm2-135m")
    job = real_job(base, tmp_path)
    job.config.rollout.engine = "vllm"
    model = job.tune().path
    check_real(tmp_path / "tiny")
    assert difference(model, base) > 1e-4
