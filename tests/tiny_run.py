"""A whole run in seconds: a tiny random model in a folder, a workflow, and a job for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from astuner import AstunerJob, ModelTuner, Task, Workflow, WorkflowOutput, WorkflowTask
from tests.chat.families import tokenizer as tokenizer_of

HERE = Path(__file__).parent


def save_tiny_model(folder: Path) -> Path:
    """A random Llama (2 layers, hidden 32) with SmolLM2's template over a byte tokenizer."""
    tokenizer = tokenizer_of("smollm2")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class EarlyLetters(Workflow):
    """One call; the reward is the share of the reply's characters before "n" in the alphabet."""

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        reply = await client.chat.completions.create(
            model="tuned", messages=[{"role": "user", "content": workflow_task.main_query}]
        )
        text = reply.choices[0].message.content or ""
        early = sum("a" <= c < "n" for c in text)
        return WorkflowOutput(reward=early / max(len(text), 1), metadata={"final_answer": text})


class TwoTurns(Workflow):
    """Two calls of one conversation; the reward is that of the second reply."""

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        messages: list[Any] = [{"role": "user", "content": workflow_task.main_query}]
        text = ""
        for _ in range(2):
            reply = await client.chat.completions.create(model="tuned", messages=messages)
            text = reply.choices[0].message.content or ""
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "on"}]
        return WorkflowOutput(reward=sum("a" <= c < "n" for c in text) / max(len(text), 1))


class FailsSometimes(EarlyLetters):
    """Every second repeat raises."""

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        if workflow_task.repeat_index % 2:
            raise ValueError("the odd ones fail")
        return await super().execute(workflow_task, tuner)


def tasks(number: int) -> list[Task]:
    return [Task(task_id=str(i), main_query=f"say {i}") for i in range(number)]


def tiny_job(model: Path, runs: Path, workflow: type = EarlyLetters, **trainer: Any) -> AstunerJob:
    """Synchronous GRPO in float32: 2 groups of 4 a step."""
    job = AstunerJob(model=str(model), n_gpu=0, experiment_name="tiny", experiment_dir=runs)
    job.set_workflow(workflow).set_data(tasks(4), validation=tasks(2))
    config = job.config
    config.model.dtype = "float32"
    config.model.lora.rank, config.model.lora.alpha = 4, 8
    config.data.max_prompt_length, config.data.max_response_length = 128, 128
    config.data.train_batch_size = 2
    config.rollout.num_repeat = 4
    config.rollout.max_response_length_in_one_turn = 6
    config.trainer_common.total_steps = 2
    config.trainer_common.optim.lr = 1e-2
    for key, value in trainer.items():
        setattr(config.trainer_common, key, value)
    return job
