"""One episode: what a good one holds, and what every kind of trouble becomes."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

from astuner.task_runner import Workflow
from astuner.types import Episode, FailureKind, WorkflowOutput

from .fakes import LIMIT, make, run, task, until

pytestmark = pytest.mark.timeout(60)


def workflow(body: Any) -> type[Workflow]:
    """A workflow whose execute is the given function of the tuner."""

    class Made(Workflow):
        def execute(self, workflow_task: Any, tuner: Any) -> Any:
            return body(tuner)

    return Made


def failure(episode: Episode) -> tuple[FailureKind, str, str, bool]:
    assert episode.failure is not None
    assert not episode.ok
    assert episode.reward is None
    found = episode.failure
    return found.kind, found.message, found.traceback, found.retriable


class Solver(Workflow):
    async def execute(self, workflow_task: Any, tuner: Any) -> WorkflowOutput:
        tuner.say("let me think")
        await asyncio.sleep(0)
        tuner.say("5")
        return WorkflowOutput(reward=0.5, is_success=True, metadata={"final_answer": "5"})


class FixedJudge:
    def __init__(self, verdict: Any) -> None:
        self.verdict = verdict
        self.seen: list[WorkflowOutput] = []

    async def compute_reward(self, task: Any, output: WorkflowOutput) -> Any:
        self.seen.append(output)
        return self.verdict


# ---------------------------------------------------------------- good episodes


async def test_a_good_episode() -> None:
    episode = await run(Solver)
    assert episode.ok
    assert (episode.reward, episode.is_success, episode.turn_rewards) == (0.5, True, None)
    assert [c.response["content"] for c in episode.calls] == ["let me think", "5"]
    assert [s.token_ids.tolist() for s in episode.samples] == [[1, 10, 7, 8], [1, 11, 7, 8]]
    assert [s.loss_mask.tolist() for s in episode.samples] == [[False, False, True, True]] * 2
    assert [s.reward for s in episode.samples] == [0.5, 0.5]
    assert episode.samples[0].group_id == "g0"
    assert episode.output is not None
    assert episode.output.metadata == {"final_answer": "5", "last_reply": "5"}
    assert episode.started_at <= episode.ended_at


async def test_execute_may_be_a_plain_function_and_may_block() -> None:
    def body(tuner: Any) -> WorkflowOutput:
        tuner.say("5")
        assert threading.current_thread() is not threading.main_thread()
        return WorkflowOutput(reward=1.0)

    assert (await run(workflow(body))).reward == 1.0


async def test_what_the_session_is_told() -> None:
    class Targeted(Solver):
        trainable_targets: list[str] | None = ["solver"]  # noqa: RUF012

    runner, server = make(Targeted, max_prompt_tokens=100, max_total_tokens=300)
    episode = await runner.run(task(), group_id="g0", seed=77, sampling="how")
    spec = server.sessions[0].spec
    assert (spec.seed, spec.sampling, spec.max_prompt_tokens, spec.max_total_tokens) == (
        77,
        "how",
        100,
        300,
    )
    assert spec.trainable_targets == frozenset({"solver"})
    assert [s.num_trained for s in episode.samples] == [0, 0]  # its calls were of "default"


async def test_a_list_of_rewards_is_one_for_each_call() -> None:
    def body(tuner: Any) -> WorkflowOutput:
        tuner.say("a")
        tuner.say("b")
        return WorkflowOutput(reward=[0.25, 0.5])

    episode = await run(workflow(body))
    assert (episode.reward, episode.turn_rewards) == (0.75, (0.25, 0.5))


async def test_the_judge_gets_the_last_reply_and_is_skipped_when_there_is_a_reward() -> None:
    def undecided(tuner: Any) -> WorkflowOutput:
        tuner.say("it is 5")
        return WorkflowOutput(is_success=False)

    judge = FixedJudge((1.0, True))
    episode = await run(workflow(undecided), judge)
    assert (episode.reward, episode.is_success) == (1.0, True)
    assert judge.seen[0].metadata["last_reply"] == "it is 5"
    assert (await run(Solver, judge)).reward == 0.5
    assert len(judge.seen) == 1


async def test_many_episodes_run_side_by_side() -> None:
    barrier = threading.Barrier(8, timeout=LIMIT)

    def body(tuner: Any) -> WorkflowOutput:
        barrier.wait()  # passes only when all eight are blocked here at once
        return WorkflowOutput(reward=1.0)

    runner, _ = make(workflow(body))
    runs = (runner.run(task(), group_id="g", seed=n, sampling=None) for n in range(8))
    assert [e.reward for e in await asyncio.gather(*runs)] == [1.0] * 8


async def test_no_calls_is_ok_but_said_once(caplog: pytest.LogCaptureFixture) -> None:
    runner, _ = make(workflow(lambda tuner: WorkflowOutput(reward=1.0)))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            episode = await runner.run(task(), group_id="g", seed=0, sampling=None)
    assert episode.ok
    assert episode.samples == ()
    assert len(caplog.records) == 1
    assert "made no LLM call" in caplog.records[0].getMessage()


async def test_sampling_that_was_overridden_is_counted_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def body(tuner: Any) -> WorkflowOutput:
        tuner.say("5")
        tuner.counters.update(calls=1, overridden_sampling=1)
        return WorkflowOutput(reward=1.0)

    runner, _ = make(workflow(body))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            await runner.run(task(), group_id="g", seed=0, sampling=None)
    assert dict(runner.counters) == {"overridden_sampling": 2}
    assert len(caplog.records) == 1
    assert "temperature, top_p, top_k or seed of its own" in caplog.records[0].getMessage()


# ---------------------------------------------------------------- trouble of the workflow


def lookup(data: dict[str, str]) -> str:
    return data["missing"]


async def test_an_exception_shows_the_users_frames_only() -> None:
    def body(tuner: Any) -> WorkflowOutput:
        tuner.say("kept")
        lookup({})
        raise AssertionError

    episode = await run(workflow(body))
    kind, message, traceback, retriable = failure(episode)
    assert (kind, retriable) == (FailureKind.WORKFLOW, False)
    assert message.startswith("Made.execute raised KeyError at test_runner.py:")
    assert message.endswith(": 'missing'")
    assert 'return data["missing"]' in traceback
    assert traceback.endswith("KeyError: 'missing'")
    assert "loop_thread.py" not in traceback
    assert len(episode.calls) == 1  # for the episode store
    assert episode.samples[0].reward == 0.0


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_nothing_the_workflow_raises_ends_the_run(error: BaseException) -> None:
    def body(tuner: Any) -> WorkflowOutput:
        raise error

    kind, message, _, _ = failure(await run(workflow(body)))
    assert kind is FailureKind.WORKFLOW
    assert type(error).__name__ in message


async def test_exiting_in_a_task_of_its_own_does_not_hang_the_episode() -> None:
    async def leave() -> None:
        sys.exit(1)

    async def body(tuner: Any) -> WorkflowOutput:
        await asyncio.gather(leave())
        return WorkflowOutput(reward=1.0)

    kind, message, _, _ = failure(await run(workflow(body)))
    assert (kind, "SystemExit" in message) == (FailureKind.WORKFLOW, True)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, "Made.execute returned None (is a return missing?)"),
        (1.0, "Made.execute returned 1.0 of type float"),
        ({"reward": 1.0}, "of type dict; it must return a WorkflowOutput"),
    ],
)
async def test_a_wrong_return_is_named(returned: Any, says: str) -> None:
    kind, message, _, _ = failure(await run(workflow(lambda tuner: returned)))
    assert kind is FailureKind.WORKFLOW
    assert says in message


async def test_the_engines_failure_is_infrastructure() -> None:
    kind, message, _, retriable = failure(await run(workflow(lambda tuner: tuner.engine_fails())))
    assert (kind, retriable) == (FailureKind.ENGINE, True)
    assert "Out of memory." in message


async def test_the_engines_failure_is_seen_behind_what_the_workflow_made_of_it() -> None:
    def swallows(tuner: Any) -> None:
        try:
            tuner.engine_fails()
        except ConnectionError:
            return

    kind, message, _, retriable = failure(await run(workflow(swallows)))
    assert (kind, retriable) == (FailureKind.ENGINE, True)
    assert message == (
        "The engine failed a call: Out of memory. Then: Made.execute returned None (is a return "
        "missing?); it must return a WorkflowOutput, e.g. WorkflowOutput(reward=1.0)."
    )


async def test_a_lost_call_that_the_workflow_swallows_is_not_trained_as_a_bad_answer() -> None:
    def swallows(tuner: Any) -> WorkflowOutput:
        tuner.say("first")
        try:
            tuner.engine_fails()
        except ConnectionError:
            return WorkflowOutput(reward=0.0)
        return WorkflowOutput(reward=1.0)

    kind, message, _, retriable = failure(await run(workflow(swallows)))
    assert (kind, retriable) == (FailureKind.ENGINE, True)
    assert message == (
        "The engine failed a call: Out of memory. Then: the workflow returned all the same."
    )


async def test_another_agents_answer_does_not_bring_a_lost_call_back() -> None:
    def both(tuner: Any) -> WorkflowOutput:
        with suppress(ConnectionError):
            tuner.engine_fails(agent="asks")
        tuner.say("the other's answer", agent="helps")
        tuner.say("the same agent's, for another target", agent="asks", target="other")
        return WorkflowOutput(reward=0.0)

    kind, message, _, retriable = failure(await run(workflow(both)))
    assert (kind, retriable) == (FailureKind.ENGINE, True)
    assert "Out of memory." in message


async def test_a_call_that_was_answered_at_the_second_attempt_is_no_failure() -> None:
    def retries(tuner: Any) -> WorkflowOutput:
        try:
            tuner.engine_fails()
        except ConnectionError:
            tuner.say("answered after all")
        return WorkflowOutput(reward=0.5)

    episode = await run(workflow(retries))
    assert episode.ok
    assert episode.reward == 0.5


async def test_a_refused_request_is_the_workflows_own_bug() -> None:
    kind, message, _, retriable = failure(await run(workflow(lambda tuner: tuner.refuse())))
    assert (kind, retriable) == (FailureKind.WORKFLOW, False)
    assert "401 Wrong key." in message


# ---------------------------------------------------------------- trouble with time


async def test_a_workflow_that_blocks_its_thread_is_left_behind_and_shown() -> None:
    released = threading.Event()

    def body(tuner: Any) -> WorkflowOutput:
        tuner.say("before")
        released.wait(LIMIT)  # blocks, like time.sleep or a synchronous client
        return WorkflowOutput(reward=1.0)

    runner, server = make(workflow(body), episode_timeout=1.0)
    episode = await runner.run(task(), group_id="g", seed=0, sampling=None)
    kind, message, traceback, retriable = failure(episode)
    assert (kind, retriable) == (FailureKind.TIMEOUT, False)
    assert "rollout.episode_timeout = 1 s. It blocks its thread" in message
    assert "released.wait(LIMIT)" in traceback
    assert server.sessions[0].closed
    assert len(episode.calls) == 1
    assert runner.threads_left_behind == 1
    released.set()
    await until(lambda: runner.threads_left_behind == 0)


async def test_a_workflow_that_awaits_for_ever_is_cancelled_and_shown() -> None:
    cleaned = threading.Event()

    async def inner() -> None:
        await asyncio.Event().wait()  # this line

    async def body(tuner: Any) -> WorkflowOutput:
        try:
            await inner()
        finally:
            cleaned.set()
        return WorkflowOutput(reward=1.0)

    runner, _ = make(workflow(body), episode_timeout=1.0, grace=LIMIT)
    episode = await runner.run(task(), group_id="g", seed=0, sampling=None)
    kind, message, traceback, _ = failure(episode)
    assert kind is FailureKind.TIMEOUT
    assert "left behind" not in message
    assert "await asyncio.Event().wait()  # this line" in traceback
    assert cleaned.wait(LIMIT)
    assert runner.threads_left_behind == 0


async def test_an_endless_loop_is_broken() -> None:
    def body(tuner: Any) -> WorkflowOutput:
        while True:
            try:
                time.sleep(0.001)
            except Exception:
                continue

    runner, _ = make(workflow(body), episode_timeout=0.2, grace=0.1)
    episode = await runner.run(task(), group_id="g", seed=0, sampling=None)
    assert failure(episode)[0] is FailureKind.TIMEOUT
    await until(lambda: runner.threads_left_behind == 0)


async def test_others_go_on_while_one_blocks() -> None:
    released = threading.Event()

    class Mixed(Workflow):
        async def execute(self, workflow_task: Any, tuner: Any) -> WorkflowOutput:
            if workflow_task.metadata.get("hang"):
                released.wait(LIMIT)
            return WorkflowOutput(reward=1.0)

    runner, _ = make(Mixed)
    stuck = asyncio.create_task(runner.run(task(hang=True), group_id="g", seed=0, sampling=None))
    good = await asyncio.wait_for(runner.run(task(), group_id="g", seed=0, sampling=None), LIMIT)
    assert good.ok
    assert not stuck.done()
    (live,) = runner.live
    assert live.waiting_for == "the workflow"
    assert "released.wait(LIMIT)" in live.where()
    released.set()
    assert (await asyncio.wait_for(stuck, LIMIT)).ok


async def test_cancelling_from_outside_closes_the_session_and_the_workflow() -> None:
    began, cancelled = threading.Event(), threading.Event()

    async def body(tuner: Any) -> WorkflowOutput:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return WorkflowOutput(reward=1.0)

    runner, server = make(workflow(body))
    running = asyncio.create_task(runner.run(task(), group_id="g", seed=0, sampling=None))
    await until(began.is_set)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert server.sessions[0].closed
    assert runner.live == ()
    assert cancelled.wait(LIMIT)


async def test_tasks_left_behind_by_a_workflow_are_cancelled() -> None:
    cancelled = threading.Event()

    async def background() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()

    kept: list[Any] = []

    async def body(tuner: Any) -> WorkflowOutput:
        kept.append(asyncio.create_task(background()))
        await asyncio.sleep(0)
        return WorkflowOutput(reward=1.0)

    assert (await run(workflow(body))).ok
    assert cancelled.wait(LIMIT)


async def test_threads_of_a_workflow_do_not_keep_the_process_alive() -> None:
    seen: list[threading.Thread] = []

    async def body(tuner: Any) -> WorkflowOutput:
        seen.append(await asyncio.to_thread(threading.current_thread))
        return WorkflowOutput(reward=1.0)

    assert (await run(workflow(body))).ok
    assert seen[0].daemon


# ---------------------------------------------------------------- trouble with the reward


def silent(tuner: Any) -> WorkflowOutput:
    tuner.say("5")
    return WorkflowOutput()


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (float("nan"), "The workflow's reward cannot be used. The reward is nan"),
        (float("inf"), "The workflow's reward cannot be used. The reward is inf"),
        ([1.0, 2.0, 3.0], "3 per-turn rewards, but the episode made 1 LLM calls"),
        ([float("nan")], "The reward at turn 0 is nan"),
    ],
)
async def test_a_reward_that_cannot_be(reward: Any, says: str) -> None:
    def body(tuner: Any) -> WorkflowOutput:
        tuner.say("5")
        return WorkflowOutput(reward=reward)

    kind, message, _, _ = failure(await run(workflow(body)))
    assert kind is FailureKind.REWARD
    assert says in message


async def test_no_reward_and_no_judge_names_both_ways_out() -> None:
    kind, message, _, _ = failure(await run(workflow(silent)))
    assert kind is FailureKind.REWARD
    assert "Return WorkflowOutput(reward=...), or set task_judge.judge_type" in message


async def test_a_judge_that_raises() -> None:
    class Raises:
        async def compute_reward(self, task: Any, output: Any) -> float:
            return float(output.metadata["no such key"])

    kind, message, traceback, _ = failure(await run(workflow(silent), Raises()))
    assert kind is FailureKind.JUDGE
    assert message.startswith("The judge raised KeyError at test_runner.py:")
    assert 'output.metadata["no such key"]' in traceback


@pytest.mark.parametrize("verdict", [float("nan"), float("-inf"), "good", None])
async def test_a_judges_reward_that_cannot_be(verdict: Any) -> None:
    episode = await run(workflow(silent), FixedJudge(verdict))
    assert failure(episode)[0] is FailureKind.REWARD


async def test_a_judges_list_must_fit_the_calls() -> None:
    assert (await run(workflow(silent), FixedJudge([0.5]))).turn_rewards == (0.5,)
    kind, message, _, _ = failure(await run(workflow(silent), FixedJudge([0.5, 0.5])))
    assert kind is FailureKind.REWARD
    assert "The judge returned 2 per-turn rewards, but the episode made 1" in message


async def test_a_slow_judge_and_one_that_blocks() -> None:
    released = threading.Event()

    class Slow:
        async def compute_reward(self, task: Any, output: Any) -> float:
            if task.metadata.get("block"):
                released.wait(LIMIT)
            await asyncio.Event().wait()
            return 1.0

    runner, _ = make(workflow(silent), Slow(), judge_timeout=1.0)
    for metadata in ({}, {"block": True}, {}):  # the third one gets a new thread
        episode = await runner.run(task(**metadata), group_id="g", seed=0, sampling=None)
        kind, message, traceback, _ = failure(episode)
        assert kind is FailureKind.JUDGE
        assert "rollout.judge_timeout = 1 s" in message
        assert ("released.wait(LIMIT)" in traceback) == bool(metadata)
    released.set()
    runner.close()


async def test_judge_calls_of_a_run_share_one_event_loop() -> None:
    class Remembers:
        loops: set[int] = set()  # noqa: RUF012

        async def compute_reward(self, task: Any, output: Any) -> float:
            self.loops.add(id(asyncio.get_running_loop()))
            return 1.0

    runner, _ = make(workflow(silent), Remembers())
    for _ in range(3):
        await runner.run(task(), group_id="g", seed=0, sampling=None)
    runner.close()
    assert len(Remembers.loops) == 1
    assert id(asyncio.get_running_loop()) not in Remembers.loops


# ---------------------------------------------------------------- debugging


async def test_in_the_callers_thread_breakpoints_stop_and_no_deadline_ends_them() -> None:
    threads: list[threading.Thread] = []

    async def body(tuner: Any) -> WorkflowOutput:
        threads.append(threading.current_thread())
        await asyncio.sleep(0.05)
        return WorkflowOutput()

    class Here:
        async def compute_reward(self, task: Any, output: Any) -> float:
            threads.append(threading.current_thread())
            return 1.0

    episode = await run(workflow(body), Here(), in_caller_thread=True, episode_timeout=0.01)
    assert episode.reward == 1.0
    assert threads == [threading.current_thread()] * 2


async def test_in_the_callers_thread_bugs_are_failures_and_ctrl_c_is_not() -> None:
    def leave(tuner: Any) -> WorkflowOutput:
        sys.exit(1)

    assert failure(await run(workflow(leave), in_caller_thread=True))[0] is FailureKind.WORKFLOW

    async def cancelled(tuner: Any) -> WorkflowOutput:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await run(workflow(cancelled), in_caller_thread=True)
