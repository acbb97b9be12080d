"""AstunerJob as a user meets it: describing, YAML, tuning, and the tuned model."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from astuner import AstunerJob, Task, TunedModel
from astuner.algorithm import ADVANTAGES, AGGREGATIONS, find_loss, resolve
from astuner.config.load import load_config
from astuner.errors import CheckpointError, ConfigError
from astuner.job.job import ALGORITHMS
from tests.tiny_run import EarlyLetters, FailsSometimes, TwoTurns, tasks, tiny_job


def test_the_minimum_example_writes_the_yaml_users_know(tmp_path: Path) -> None:
    from tutorial.example_math_agent.math_agent_simplify import MathToolWorkflow

    job = AstunerJob(backbone="local", model="smollm2-135m", n_gpu=0, algorithm="grpo")
    job.set_workflow(MathToolWorkflow)
    job.set_data(type="hf", dataset_path="openai/gsm8k")
    path = job.dump_job_as_yaml(tmp_path / "saved" / "math.yaml")
    config = load_config(path).config
    workflow = "tutorial.example_math_agent.math_agent_simplify->MathToolWorkflow"
    assert config.rollout.user_workflow == workflow
    assert config.task_reader.type == "huggingface_dat_repo"
    assert config.task_reader.huggingface_dat_repo.dataset_path == "openai/gsm8k"
    assert config.model.device == "cpu"
    again = AstunerJob().load_job_from_yaml(path)
    assert again.dump_job_as_yaml(tmp_path / "again.yaml").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("n_gpu", "device", "gpus"), [(8, "cuda", 8), (1, "cuda", 1), (0, "cpu", 8), (None, "auto", 8)]
)
def test_gpus_for_verl(n_gpu: int | None, device: str, gpus: int) -> None:
    config = AstunerJob("verl", "Qwen/Qwen2.5-7B-Instruct", n_gpu).config
    trainer = config.trainer_common
    assert (trainer.device, trainer.n_gpus_per_node, config.model.device) == (device, gpus, "auto")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_by_name_exists(name: str) -> None:
    algorithm = AstunerJob(algorithm=name).config.trainer_common.algorithm
    assert callable(resolve(ADVANTAGES, algorithm.adv_estimator))
    assert callable(resolve(AGGREGATIONS, algorithm.loss_agg_mode))
    assert callable(find_loss(algorithm.loss))


def test_bad_arguments_name_the_value_and_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"gppo.*grpo"):
        AstunerJob(algorithm="gppo")
    with pytest.raises(ConfigError, match="n_gpu=2"):
        AstunerJob(n_gpu=2)


def test_a_misspelt_key_is_an_error() -> None:
    job = AstunerJob()
    with pytest.raises(Exception, match="learning_rate"):
        job.config.trainer_common.optim.learning_rate = 1.0  # pyright: ignore


def test_what_has_no_name_cannot_be_written_but_can_be_run(tmp_path: Path) -> None:
    job = AstunerJob().set_workflow(EarlyLetters).set_data([Task(main_query="q")])
    with pytest.raises(ConfigError, match="list of Tasks"):
        job.dump_job_as_yaml(tmp_path / "x.yaml")


def test_what_was_set_last_counts(tmp_path: Path) -> None:
    def judge(task: object, output: object) -> float:
        return 0.0

    job = AstunerJob().set_workflow(EarlyLetters).set_judge(judge).set_data([Task(main_query="q")])
    job.set_judge("math_verify").set_data("random_dummy")
    assert job._judge is None
    assert job._tasks is None
    config = load_config(job.dump_job_as_yaml(tmp_path / "x.yaml")).config
    assert (config.task_judge.judge_type, config.task_judge.judge_protocol) == ("math_verify", "")


def test_without_validation_tasks_there_is_no_score(tiny_model_dir: Path, tmp_path: Path) -> None:
    job = tiny_job(tiny_model_dir, tmp_path, total_steps=1).set_data(tasks(2))
    summary = job.tune().metrics
    assert (summary["eval_before"], summary["eval_after"], summary["evals"]) == (None, None, {})
    assert "eval/score" not in (tmp_path / "tiny" / "metrics.jsonl").read_text()


def test_tune_end_to_end(tiny_model_dir: Path, tmp_path: Path) -> None:
    tuned = tiny_job(tiny_model_dir, tmp_path).tune()
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary == dict(tuned.metrics)
    wanted = {"backbone", "model", "steps", "eval_before", "eval_after", "train_seconds"}
    wanted |= {"tokens_sampled", "tokens_trained", "tokens_masked_by_reason", "run_dir"}
    assert wanted <= summary.keys()
    assert summary["steps"] == 2
    # 2 steps x 2 groups x 4 episodes of at most 6 tokens; all sampled tokens are accounted for.
    assert 16 <= summary["tokens_sampled"] <= 96
    sampled_but_not_trained = sum(
        n for reason, n in summary["tokens_masked_by_reason"].items() if reason != "context"
    )
    assert summary["tokens_trained"] + sampled_but_not_trained == summary["tokens_sampled"]
    assert (tuned.path / "adapter_model.safetensors").is_file()
    assert isinstance(tuned.chat("hello", max_tokens=3), str)
    tuned.close()


def test_a_run_folder_opens_as_the_tuned_model_and_merges(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned = tiny_job(tiny_model_dir, tmp_path).tune()
    opened = TunedModel.load(tmp_path / "tiny")
    assert opened.path == tuned.path
    merged = opened.merge(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(merged)("hello")["input_ids"]])
    assert not torch.equal(model(ids).logits, base(ids).logits)
    with pytest.raises(CheckpointError, match="not empty"):
        opened.merge(tmp_path / "merged")


def test_tune_works_where_a_loop_is_running(tiny_model_dir: Path, tmp_path: Path) -> None:
    async def notebook() -> TunedModel:
        return tiny_job(tiny_model_dir, tmp_path, total_steps=1).tune()

    assert asyncio.run(notebook()).metrics["steps"] == 1


def test_failing_episodes_are_counted_and_the_run_goes_on(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tiny_job(tiny_model_dir, tmp_path, FailsSometimes).tune()
    assert tuned.metrics["steps"] == 2
    assert tuned.metrics["episodes"] == 16
    assert tuned.metrics["episodes_failed"] == 8
    assert "the odd ones fail" in capsys.readouterr().out


def test_two_turns_make_one_timeline(tiny_model_dir: Path, tmp_path: Path) -> None:
    import pandas as pd

    tiny_job(tiny_model_dir, tmp_path, TwoTurns, total_steps=1).tune()
    episodes = pd.read_parquet(tmp_path / "tiny" / "episodes")
    train = episodes[episodes.split == "train"]
    assert len(train) == 8
    assert (train.num_calls == 2).all()
    assert all(max(turns) == 1 for turns in train.turns)


def test_asynchronous_rollouts(tiny_model_dir: Path, tmp_path: Path) -> None:
    job = tiny_job(tiny_model_dir, tmp_path, total_steps=3)
    job.config.rollout.max_staleness = 1
    assert job.tune().metrics["steps"] == 3


def test_full_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    job = tiny_job(tiny_model_dir, tmp_path, total_steps=1)
    job.config.model.lora.enable = False
    assert (job.tune().path / "model.safetensors").is_file()


def test_a_second_run_gets_a_folder_of_its_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    job = tiny_job(tiny_model_dir, tmp_path, total_steps=1)
    assert job.tune().metrics["run_dir"].endswith("tiny")
    assert job.tune().metrics["run_dir"].endswith("tiny-2")
