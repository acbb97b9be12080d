"""A worker over scripted rollout servers: the agent loop's world without verl and Ray.

Tasks carry a plan in their metadata: for each repeat how many timelines it plays and what
reward it earns, or how it fails. `Planned` plays it with the synchronous `openai` SDK.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openai import OpenAI

from astuner import ModelTuner, Task, Workflow, WorkflowOutput, WorkflowTask
from astuner.backbone.spawned.files import JobFile, write_job
from astuner.backbone.verl.opening import open_worker
from astuner.backbone.verl.worker import Asked, Worker
from astuner.config.schema import AstunerConfig
from astuner.task_reader import TaskSplits
from tests.chat.families import tokenizer

END = 485
OK = [78, 74, END]
"""The reply "ok", and the end of the turn."""
ACTOR = [485, 198, 484, 339, 198]
"""The end of the user's turn and the opening of the assistant's."""
SYSTEM = [484, 452, 198, 444, 415, 261, 477, 220, 32, 40, 417, 220, 313, 67, 220, 50, 76, 78]
SYSTEM += [75, 43, 44, 11, 260, 81, 64, 292, 68, 67, 403, 220, 39, 84, 70, 70, 292, 70, 220]
SYSTEM += [37, 64, 66, 68, 485, 198]
USER = [484, 429, 198]


def prompt(*letters: int) -> list[int]:
    """The opening prompt of a user who says these tokens."""
    return [*SYSTEM, *USER, *letters, *ACTOR]


@dataclass
class Answer:
    """What verl's servers return."""

    token_ids: list[int]
    log_probs: list[float] | None
    stop_reason: str | None = "completed"
    extra_fields: dict[str, Any] = field(default_factory=dict)


def answer(ids: Sequence[int] = OK, oldest: int = 3, newest: int = 3, **more: Any) -> Answer:
    fields = {"global_steps": newest, "min_global_steps": oldest, "max_global_steps": newest}
    logprobs = [-0.25 * (n + 1) for n in range(len(ids))]
    return Answer(list(ids), **{"log_probs": logprobs, "extra_fields": fields} | more)


class FakeServers:
    """verl's client: `script` gives the answer, or the error, of the nth call."""

    def __init__(self, script: Callable[[int], Answer | Exception] = lambda n: answer()) -> None:
        self.script = script
        self.calls: list[tuple[str, list[int], dict[str, Any]]] = []
        self.loops: set[asyncio.AbstractEventLoop] = set()
        self.gate: asyncio.Event | None = None
        self.cancelled = 0

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]
    ) -> Answer:
        number = len(self.calls)
        self.calls.append((request_id, prompt_ids, sampling_params))
        self.loops.add(asyncio.get_running_loop())
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        result = self.script(number)
        if isinstance(result, Exception):
            raise result
        return result


class Planned(Workflow):
    """Timeline 0 has two turns, every other one is a conversation of its own."""

    def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        plan = workflow_task.metadata["plan"][workflow_task.repeat_index]
        if plan == "raise":
            raise RuntimeError("the plan says so")
        way = tuner.as_oai_baseurl_apikey()
        client = OpenAI(base_url=way.base_url, api_key=way.api_key, max_retries=0)
        for timeline in range(plan["timelines"]):
            messages = [{"role": "user", "content": "abc"[timeline]}]
            for turn in range(2 if timeline == 0 else 1):
                reply: Any = client.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
                said = reply.choices[0].message.content
                messages += [{"role": "assistant", "content": said}]
                messages += [{"role": "user", "content": "xyz"[turn]}]
        return WorkflowOutput(reward=plan["reward"], is_success=plan.get("success"))


def play(reward: float, timelines: int = 1, **more: Any) -> dict[str, Any]:
    return {"reward": reward, "timelines": timelines, **more}


def planned(*plan: Any) -> Task:
    return Task(main_query="q", metadata={"plan": list(plan)})


def verl_config(
    adv_estimator: str = "astuner",
    workers: int = 1,
    loss_agg_mode: str = "seq-mean-token-mean",
    **rollout: Any,
) -> Any:
    """The keys of verl's configuration that the worker reads."""
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
    fields: dict[str, Any] = {
        "name": "embedded",
        "n": 2,
        "agent": SimpleNamespace(num_workers=workers),
        "max_model_len": None,
        "prompt_length": 128,
        "response_length": 128,
        "val_kwargs": SimpleNamespace(**sampling | {"temperature": 0.0}, n=1),
        **sampling,
    }
    return SimpleNamespace(
        algorithm=SimpleNamespace(adv_estimator=adv_estimator),
        actor_rollout_ref=SimpleNamespace(
            rollout=SimpleNamespace(**fields | rollout),
            actor=SimpleNamespace(loss_agg_mode=loss_agg_mode),
        ),
    )


def job_config() -> AstunerConfig:
    config = AstunerConfig(seed=7)
    config.data.max_prompt_length = config.data.max_response_length = 128
    config.data.train_batch_size = 2
    config.rollout.max_response_length_in_one_turn = 8
    config.rollout.max_retries = 1
    return config


def write(
    folder: Path,
    train: Sequence[Task],
    validation: Sequence[Task] = (),
    workflow: type = Planned,
    config: AstunerConfig | None = None,
) -> None:
    tasks = TaskSplits(list(train), list(validation))
    write_job(folder, JobFile(config or job_config(), workflow, None, tasks, folder))


@asynccontextmanager
async def opened(folder: Path, servers: Any, verl: Any = None) -> AsyncGenerator[Worker]:
    """The worker of the job in the folder, closed at the end; retries do not wait."""
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        worker = await asyncio.to_thread(
            open_worker, folder, verl or verl_config(), servers, tokenizer("smollm2"), loop, stack
        )
        rollout = worker._bench.rollout
        rollout.settings = replace(rollout.settings, backoff=0.0)
        yield worker


async def ask(
    worker: Worker, index: int = 0, *, split: str = "train", sessions: int = 2, step: int = 1
) -> list[Any]:
    """All sessions of a row: their rows, or what they raised."""
    asked = [Asked(f"uid{index}", n, split, index, index, step) for n in range(sessions)]
    work = (worker.session(one) for one in asked)
    return await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 30)
