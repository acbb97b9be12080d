"""Asks the judge for the reward of one episode, with a deadline.

All judge calls of a run share one thread with one event loop, so that a judge may
keep an async client. One that blocks this loop beyond its deadline is left behind
with its thread, and the next call gets a new one. The judge's exceptions become a
Failure here; what a reward must look like is the business of `task_judge`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from astuner.errors import RewardError
from astuner.task_judge import Judge, Verdict, score
from astuner.task_runner.loop_thread import Ended, LoopThread, run_here
from astuner.task_runner.rewards import Score, bad_reward, checked
from astuner.task_runner.stacks import raised_at, user_traceback
from astuner.types import Failure, FailureKind, WorkflowOutput, WorkflowTask


class Judging:
    """A judge and the thread it runs in."""

    def __init__(self, judge: Judge, timeout: float, *, in_caller_thread: bool = False) -> None:
        self._judge = judge
        self._timeout = timeout
        self._here = in_caller_thread
        self._thread: LoopThread | None = None

    async def score(
        self,
        task: WorkflowTask,
        output: WorkflowOutput,
        num_calls: int,
        watch: Callable[[Callable[[], str]], None],
    ) -> Score:
        """The judge's verdict on one output. `watch` is given a way to ask where it is."""

        async def work() -> Verdict:
            return await score(self._judge, task, output)

        if self._here:
            return _as_score(await run_here(work), output, num_calls)
        if self._thread is None:
            self._thread = LoopThread("judge")
        thread = self._thread
        running = thread.start(work)
        watch(running.where)
        try:
            ended = await running.wait(self._timeout or None)
        finally:
            running.cancel()
        if ended is not None:
            return _as_score(ended, output, num_calls)
        where = running.where()
        if await running.wait(1.0) is None and self._thread is thread:
            self._thread = None  # it does not listen: leave it behind
            thread.close()
        return Score(failure=self._too_slow(where))

    def close(self) -> None:
        """End the judge's thread. Does not wait."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def _too_slow(self, where: str) -> Failure:
        return Failure(
            FailureKind.JUDGE,
            f"The judge did not answer within rollout.judge_timeout = {self._timeout:g} s. "
            "If it blocks (a synchronous client or time.sleep in an async function), write "
            "compute_reward as a plain `def`, or await something asynchronous.",
            where,
        )


def _as_score(ended: Ended[Verdict], output: WorkflowOutput, num_calls: int) -> Score:
    error, verdict = ended.error, ended.value
    if isinstance(error, RewardError):
        return bad_reward(f"The judge's reward cannot be used. {error}")
    if error is not None or verdict is None:
        return Score(failure=_judge_failure(error))
    if verdict.is_success is None:
        verdict = replace(verdict, is_success=output.is_success)
    return checked(verdict, num_calls, "judge")


def _judge_failure(error: BaseException | None) -> Failure:
    if error is None:
        return Failure(FailureKind.JUDGE, "The judge ended without a verdict.")
    at = f" at {place}" if (place := raised_at(error)) else ""
    return Failure(
        FailureKind.JUDGE,
        f"The judge raised {type(error).__name__}{at}: {error}",
        user_traceback(error),
    )
