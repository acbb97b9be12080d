"""Every shape a judge may be written in, and what is said of those that are none."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import sys
import threading
from pathlib import Path

import pytest

from astuner.config.check import CHOICES
from astuner.config.schema import TaskJudgeConfig
from astuner.errors import ConfigError, LoadingError, RewardError
from astuner.task_judge import JUDGES, Verdict, make_judge, score, wrap_judge
from astuner.types import Task, WorkflowOutput, WorkflowTask

TASK = WorkflowTask(task=Task(main_query="q", metadata={"answer": "4"}))
OUTPUT = WorkflowOutput(metadata={"final_answer": "4"})
RIGHT = Verdict(1.0, None, True)


def right(task: WorkflowTask, output: WorkflowOutput) -> tuple[float, bool]:
    same = output.metadata["final_answer"] == task.metadata["answer"]
    return float(same), same


async def right_async(task: WorkflowTask, output: WorkflowOutput) -> tuple[float, bool]:
    await asyncio.sleep(0)
    return right(task, output)


class Sync:
    def compute_reward(self, task, output):
        return right(task, output)


class Async:
    async def compute_reward(self, task, output):
        return await right_async(task, output)


class Static:
    @staticmethod
    def compute_reward(task, output):
        return right(task, output)


class CallableSync:
    def __call__(self, task, output):
        return right(task, output)


class CallableAsync:
    async def __call__(self, task, output):
        return await right_async(task, output)


def with_extra(extra, task, output):
    return right_async(task, output)


SHAPES = {
    "function": right,
    "async function": right_async,
    "lambda": lambda task, output: right(task, output),
    "lambda of async": lambda task, output: right_async(task, output),
    "partial": functools.partial(with_extra, "x"),
    "class": Sync,
    "instance": Sync(),
    "async class": Async,
    "async instance": Async(),
    "static": Static,
    "callable": CallableSync(),
    "async callable": CallableAsync(),
    "bound method": Async().compute_reward,
    "wrapped": wrap_judge(right),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
async def test_shapes(shape: object) -> None:
    assert await score(wrap_judge(shape), TASK, OUTPUT) == RIGHT
    wrong = WorkflowOutput(metadata={"final_answer": "5"})
    assert await score(wrap_judge(shape), TASK, wrong) == Verdict(0.0, None, False)


async def test_sync_judges_run_side_by_side_off_the_loop() -> None:
    """Each waits for the other, so this ends only if neither blocks the loop."""
    barrier = threading.Barrier(12, timeout=30)
    threads: set[str] = set()
    trace: contextvars.ContextVar[str] = contextvars.ContextVar("trace")
    trace.set("here")

    def judge(task, output):
        barrier.wait()
        threads.add(threading.current_thread().name)
        assert threading.current_thread().daemon
        return 1.0 if trace.get() == "here" else 0.0

    judges = [score(wrap_judge(judge), TASK, OUTPUT) for _ in range(12)]
    verdicts = await asyncio.wait_for(asyncio.gather(*judges), 30)
    assert verdicts == [Verdict(1.0, None, None)] * 12
    assert threads == {"astuner-judge"}


async def test_a_judge_that_never_returns_can_be_left_behind() -> None:
    release = threading.Event()
    judge = wrap_judge(lambda task, output: release.wait(30))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(score(judge, TASK, OUTPUT), 0.05)
    release.set()


@pytest.mark.parametrize("kind", [Sync, Async])
async def test_what_a_judge_raises_comes_through(kind: type) -> None:
    with pytest.raises(KeyError, match="final_answer"):
        await score(wrap_judge(kind), TASK, WorkflowOutput())


async def test_a_bad_reward_is_typed() -> None:
    with pytest.raises(RewardError, match="The reward is None"):
        await score(wrap_judge(lambda task, output: None), TASK, OUTPUT)


class NeedsArguments:
    def __init__(self, model):
        pass

    compute_reward = right


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (3, "int is no judge: it needs a method compute_reward(task, output), or be a function"),
        (Path, "The class Path has no method compute_reward."),
        (NeedsArguments, "The judge class NeedsArguments must be made without arguments: "),
        (lambda task: 1.0, "must take (task, output), but its signature is (task): too many pos"),
        (with_extra, "The judge with_extra must take (task, output), but its signature is"),
    ],
)
def test_what_is_no_judge(obj: object, message: str) -> None:
    with pytest.raises(LoadingError) as caught:
        wrap_judge(obj)
    assert message in str(caught.value)


# ---------------------------------------------------------------- from the configuration


def test_the_schema_offers_exactly_these_judges() -> None:
    assert {"none", "customized_protocol", *JUDGES} == set(CHOICES["task_judge.judge_type"])


def test_no_judge() -> None:
    assert make_judge(TaskJudgeConfig()) is None


async def test_a_judge_of_ones_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_judge.py").write_text("def judge(task, output): return 0.25\n")
    config = TaskJudgeConfig(judge_type="customized_protocol", judge_protocol="own_judge->judge")
    judge = make_judge(config)
    assert judge is not None
    assert await score(judge, TASK, OUTPUT) == Verdict(0.25, None, None)
    judge = wrap_judge("own_judge.py->judge")
    assert await score(judge, TASK, OUTPUT) == Verdict(0.25, None, None)
    with pytest.raises(LoadingError, match=r"The judge 'own_judge->juge': .* Did you mean judge?"):
        make_judge(
            TaskJudgeConfig(judge_type="customized_protocol", judge_protocol="own_judge->juge")
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskJudgeConfig(judge_type="customized_protocol"), "which needs astuner.task_judge.judg"),
        (TaskJudgeConfig(judge_type="exact"), "is 'exact', but must be one of none, customized_"),
        (TaskJudgeConfig(judge_type="regex"), "is regex, which needs astuner.task_judge.regex.pat"),
        (TaskJudgeConfig(judge_type="llm"), "is llm, which needs astuner.task_judge.llm.base_url."),
    ],
)
def test_an_incomplete_configuration(config: TaskJudgeConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_judge(config)
    assert message in str(caught.value)
