"""Small recorded episodes with literal ids."""

from __future__ import annotations

from typing import Any

import numpy as np

from astuner.types import (
    Call,
    Episode,
    Failure,
    FailureKind,
    MaskReason,
    Sample,
    Task,
    WorkflowOutput,
    token_ids,
)


def call(**changes: Any) -> Call:
    values: dict[str, Any] = {
        "call_id": "c0",
        "episode_id": "e0",
        "agent_name": "default",
        "target_tag": "main",
        "prompt_ids": token_ids([1, 2]),
        "completion_ids": token_ids([7, 8]),
        "logprobs": np.array([-0.5, -0.25], np.float32),
        "weight_versions": np.array([3, 3], np.int32),
        "finish_reason": "stop",
        "request": {"messages": [{"role": "user", "content": "2+3?"}]},
        "response": {"role": "assistant", "content": "5"},
        "started_at": 10.0,
        "ended_at": 10.5,
    }
    return Call(**values | changes)


def sample(**changes: Any) -> Sample:
    values: dict[str, Any] = {
        "sample_id": "e0/0",
        "episode_id": "e0",
        "group_id": "g0",
        "task_id": "q0",
        "agent_name": "default",
        "target_tag": "main",
        "token_ids": token_ids([1, 2, 7, 8]),
        "loss_mask": np.array([False, False, True, True]),
        "logprobs": np.array([0, 0, -0.5, -0.25], np.float32),
        "spans": np.array([[2, 4, 0, 3]], np.int32),
        "reward": 1.0,
        "masked": {MaskReason.CONTEXT: 2},
    }
    return Sample(**values | changes)


def episode(**changes: Any) -> Episode:
    values: dict[str, Any] = {
        "episode_id": "e0",
        "group_id": "g0",
        "task": Task(task_id="q0", main_query="2+3?", metadata={"answer": "5"}),
        "repeat_index": 0,
        "split": "train",
        "calls": (call(),),
        "samples": (sample(),),
        "output": WorkflowOutput(metadata={"final_answer": "5"}),
        "reward": 1.0,
        "turn_rewards": None,
        "is_success": True,
        "failure": None,
        "started_at": 9.0,
        "ended_at": 11.0,
    }
    return Episode(**values | changes)


def failed(**changes: Any) -> Episode:
    failure = Failure(FailureKind.WORKFLOW, "execute raised KeyError: 'x'", "line 3")
    nothing: dict[str, Any] = {"calls": (), "samples": (), "output": None, "reward": None}
    return episode(episode_id="e1", is_success=None, failure=failure, **nothing | changes)
