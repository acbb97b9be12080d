"""One episode, from a task to an Episode.

Opens a session, runs the user's workflow under a deadline, asks the judge, turns
the recorded calls into samples. Whatever goes wrong in user code, judge or engine
comes back as `Episode.failure`; only a cancellation from outside is raised. It does
not retry, knows no groups, and never looks into a token.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from astuner.context_tracker import build_samples
from astuner.errors import AstunerError
from astuner.model_tuner.session import Problem, SessionSampling, SessionSpec
from astuner.task_judge import Judge
from astuner.task_runner.environments import (
    Environments,
    environment_score,
    not_opened,
    or_environment,
    show_start,
)
from astuner.task_runner.failures import (
    engine_failed,
    overdue,
    targets_widened,
    unrecovered,
    workflow_raised,
    wrong_type,
)
from astuner.task_runner.judging import Judging
from astuner.task_runner.live import LiveEpisode
from astuner.task_runner.loop_thread import Ended, LoopThread, Running, Work, run_here
from astuner.task_runner.rewards import Score, bad_reward, checked_targets, own_score
from astuner.task_runner.workflow import (
    Workflow,
    check_workflow,
    declared_targets,
    trained_targets,
)
from astuner.types import (
    Call,
    Episode,
    Failure,
    Sample,
    WorkflowOutput,
    WorkflowTask,
)

if TYPE_CHECKING:
    from astuner.model_tuner import ModelTuner

log = logging.getLogger(__name__)


class Session(Protocol):
    """What the runner needs of a proxy session."""

    @property
    def calls(self) -> Sequence[Call]: ...
    @property
    def problems(self) -> Sequence[Problem]:
        """Errors that clients were told, oldest first."""
        ...

    @property
    def counters(self) -> Mapping[str, int]:
        """What happened to its calls, by name; `calls` is how many were answered."""
        ...

    @property
    def in_flight(self) -> int: ...

    @property
    def tuner(self) -> ModelTuner: ...
    def close(self) -> Sequence[Call]:
        """Kill the keys, cancel what is pending, return the answered calls."""
        ...


class SessionServer(Protocol):
    def open_session(self, spec: SessionSpec) -> Session: ...


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """Limits of one episode, in seconds (0 means none) and tokens (None means none)."""

    episode_timeout: float = 600.0
    judge_timeout: float = 120.0
    max_prompt_tokens: int | None = None
    max_total_tokens: int | None = None
    max_calls_per_agent: int = 0
    """0 means no limit."""
    merge: str = "prefix"
    named_targets: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """Target tags that the configuration names -> whether they are trained."""
    in_caller_thread: bool = False
    """Run workflow and judge in the thread that calls `run`, so that breakpoints stop. Then
    `episode_timeout` is off: a breakpoint may last as long as it likes."""
    grace: float = 2.0
    """Seconds a cancelled workflow gets to end before its thread is left behind."""


@dataclass(frozen=True, slots=True)
class _Returned:
    output: object
    targets: frozenset[str] | None


class EpisodeRunner:
    """Runs episodes of one workflow; many at once, each with a thread of its own."""

    def __init__(
        self,
        workflow_cls: type[Workflow],
        judge: Judge | None,
        server: SessionServer,
        settings: RunnerSettings,
        environments: Environments | None = None,
    ) -> None:
        """Raises UserCodeError when the workflow cannot be run at all."""
        self._environments = environments
        self._workflow_cls = check_workflow(workflow_cls)
        self._server = server
        self._settings = settings
        self._judging = None
        if judge is not None:
            self._judging = Judging(
                judge, settings.judge_timeout, in_caller_thread=settings.in_caller_thread
            )
        self._live: dict[str, LiveEpisode] = {}
        self._left_behind: list[LoopThread] = []
        self._warned: set[str] = set()
        self.counters: Counter[str] = Counter()
        """What happened in sessions besides answered calls; whoever reads it clears it."""

    @property
    def live(self) -> tuple[LiveEpisode, ...]:
        """Episodes that have not ended. May be read from any thread."""
        return tuple(self._live.values())

    @property
    def threads_left_behind(self) -> int:
        """Threads of abandoned episodes that still run."""
        self._left_behind = [thread for thread in self._left_behind if thread.alive]
        return len(self._left_behind)

    def close(self) -> None:
        """End the judge's thread."""
        if self._judging:
            self._judging.close()

    async def run(
        self,
        workflow_task: WorkflowTask,
        *,
        group_id: str,
        seed: int,
        sampling: SessionSampling,
    ) -> Episode:
        """Run one episode; never raises for what user code, judge or engine do.

        `workflow_task.episode_id` must be unique among the episodes that are running.
        """
        started_at = time.time()
        session = self._server.open_session(self._spec(workflow_task, seed, sampling))
        with self._alive(workflow_task, session) as live:
            try:
                ended = await self._set_up(workflow_task, live)
                ended = ended or await self._execute(workflow_task, session, live)
            finally:
                session.close()
                self._count(workflow_task, session)
            calls = tuple(sorted(session.calls, key=lambda call: call.started_at))
            targets, result = self._classify(ended, unrecovered(session.problems, calls))
            raised = ended.error if isinstance(ended, Ended) else None
            result = or_environment(workflow_task, raised, result)
            if isinstance(result, WorkflowOutput):
                result = _with_last_reply(result, calls)
                score = await self._score(workflow_task, result, len(calls), live)
            else:
                score = Score(failure=result)
            targets, score = self._by_target(score, calls, targets)
        if score.failure is None and not calls:
            self._warn_no_calls(workflow_task)
        return Episode(
            episode_id=workflow_task.episode_id,
            group_id=group_id,
            task=workflow_task.task,
            repeat_index=workflow_task.repeat_index,
            split=workflow_task.split,
            calls=calls,
            samples=self._samples(calls, workflow_task, group_id, score, targets),
            output=result if isinstance(result, WorkflowOutput) else None,
            reward=score.reward,
            turn_rewards=score.turn_rewards,
            is_success=score.is_success,
            failure=score.failure,
            started_at=started_at,
            ended_at=time.time(),
            target_rewards=score.target_rewards,
        )

    def _by_target(
        self, score: Score, calls: Sequence[Call], declared: frozenset[str] | None
    ) -> tuple[frozenset[str] | None, Score]:
        """Which targets are trained, and the score if its targets are those of the calls."""
        named, tags = self._settings.named_targets, [call.target_tag for call in calls]
        trained = trained_targets(declared, tags, named)
        return trained, checked_targets(score, tags, trained, {*named, *(declared or ())})

    def _samples(
        self,
        calls: Sequence[Call],
        task: WorkflowTask,
        group_id: str,
        score: Score,
        targets: frozenset[str] | None,
    ) -> tuple[Sample, ...]:
        """Also of a failed episode, for the episode store; its reward is then 0."""
        samples = build_samples(
            calls,
            group_id=group_id,
            task_id=task.task_id,
            reward=score.reward or 0.0,
            trainable_targets=targets,
            max_prompt_tokens=self._settings.max_prompt_tokens,
            max_total_tokens=self._settings.max_total_tokens,
            merge=self._settings.merge,
        )
        return tuple(replace(s, reward=score.of_target(s.target_tag)) for s in samples)

    def _spec(self, task: WorkflowTask, seed: int, sampling: SessionSampling) -> SessionSpec:
        return SessionSpec(
            episode_id=task.episode_id,
            seed=seed,
            sampling=sampling,
            max_prompt_tokens=self._settings.max_prompt_tokens,
            max_total_tokens=self._settings.max_total_tokens,
            max_calls_per_agent=self._settings.max_calls_per_agent,
            trainable_targets=declared_targets(self._workflow_cls),
            untrained_targets=frozenset(
                tag for tag, trained in self._settings.named_targets.items() if not trained
            ),
        )

    @contextmanager
    def _alive(self, task: WorkflowTask, session: Session) -> Generator[LiveEpisode]:
        live = LiveEpisode(task.episode_id, task.task_id, lambda: session.in_flight)
        self._live[task.episode_id] = live
        try:
            yield live
        finally:
            self._live.pop(task.episode_id, None)
            self._give_back(task)

    # ---------------------------------------------------------------- the environment

    async def _set_up(self, task: WorkflowTask, live: LiveEpisode) -> Failure | None:
        """The task's environment, if the run has any; or why there is none."""
        if self._environments is None:
            return None
        live.enter("its environment")
        try:
            env = await self._environments.open(task.task, task.episode_id)
        except AstunerError as error:
            return not_opened(error)
        show_start(task, env)
        live.enter("the workflow")
        return None

    def _give_back(self, task: WorkflowTask) -> None:
        if self._environments is not None:
            if task.gym_env is not None:
                self._environments.release(task.gym_env)
                task.gym_env = None
            self.counters.update(self._environments.counters)
            self._environments.counters.clear()

    # ---------------------------------------------------------------- the workflow

    async def _execute(
        self, task: WorkflowTask, session: Session, live: LiveEpisode
    ) -> Ended[_Returned] | Failure:
        async def work() -> _Returned:
            workflow = self._workflow_cls()
            output: Any = workflow.execute(task, session.tuner)
            if inspect.isawaitable(output):
                output = await output
            return _Returned(output, declared_targets(workflow))

        if self._settings.in_caller_thread:
            return await run_here(work)
        return await self._in_thread(work, session, live)

    async def _in_thread(
        self, work: Work[_Returned], session: Session, live: LiveEpisode
    ) -> Ended[_Returned] | Failure:
        thread = LoopThread(f"episode {live.episode_id}")
        running = thread.start(work)
        live.watch(running.where)
        try:
            ended = await running.wait(self._settings.episode_timeout or None)
            return ended or await self._overdue(running, thread, session)
        finally:
            running.cancel()
            thread.close()

    async def _overdue(
        self, running: Running[_Returned], thread: LoopThread, session: Session
    ) -> Failure:
        """End an episode whose time is over, or leave its thread behind."""
        where, calls_in_flight = running.where(), session.in_flight
        session.close()
        running.cancel()
        left_behind = await running.wait(self._settings.grace) is None
        if left_behind:
            thread.interrupt()
            self._left_behind.append(thread)
        return overdue(
            self._settings.episode_timeout,
            where,
            calls_in_flight=calls_in_flight,
            left_behind=left_behind,
        )

    def _classify(
        self, ended: Ended[_Returned] | Failure, lost: Problem | None
    ) -> tuple[frozenset[str] | None, WorkflowOutput | Failure]:
        """Trainable targets, and the output or why there is none; with a call lost to the
        engine, that is why, also where the workflow swallowed it."""
        targets, result = self._outcome(ended)
        if lost is None:
            return targets, result
        if isinstance(result, WorkflowOutput):
            return targets, engine_failed(lost, "the workflow returned all the same.")
        return targets, engine_failed(lost, result.message, result.traceback)

    def _outcome(
        self, ended: Ended[_Returned] | Failure
    ) -> tuple[frozenset[str] | None, WorkflowOutput | Failure]:
        targets = declared_targets(self._workflow_cls)
        name = f"{self._workflow_cls.__name__}.execute"
        if isinstance(ended, Failure):
            return targets, ended
        if ended.error is not None:
            return targets, workflow_raised(name, ended.error)
        returned = ended.value
        if returned is None or not isinstance(returned.output, WorkflowOutput):
            return targets, wrong_type(name, returned and returned.output)
        now = returned.targets
        if targets is not None and (now is None or not now <= targets):
            return targets, targets_widened(name, now, targets)
        return returned.targets, returned.output

    # ---------------------------------------------------------------- the reward

    async def _score(
        self, task: WorkflowTask, output: WorkflowOutput, num_calls: int, live: LiveEpisode
    ) -> Score:
        own = own_score(output, num_calls)
        if own is not None:
            return own
        if self._judging is None and task.gym_env is not None:
            return await environment_score(task, output, live)
        if self._judging is None:
            return bad_reward(
                f"{self._workflow_cls.__name__}.execute returned no reward and the run has no "
                "judge. Return WorkflowOutput(reward=...), or set task_judge.judge_type."
            )
        live.enter("the judge")
        return await self._judging.score(task, output, num_calls, live.watch)

    def _count(self, task: WorkflowTask, session: Session) -> None:
        self.counters.update({n: c for n, c in session.counters.items() if n != "calls"})
        if self.counters["overridden_sampling"]:
            self._warn_once(
                "sampling",
                f"Episode {task.episode_id} asked for a temperature, top_p, top_k or seed of its "
                "own; replies are drawn with those of rollout (val_kwargs in validation).",
            )

    def _warn_no_calls(self, task: WorkflowTask) -> None:
        self._warn_once(
            "no calls",
            f"Episode {task.episode_id} made no LLM call through the tuner, so there is nothing "
            "to train on. Use tuner.as_raw_openai_sdk_client(), as_agentscope_model() or "
            "as_oai_baseurl_apikey() for the model that is tuned.",
        )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s (Said once.)", message)


def _with_last_reply(output: WorkflowOutput, calls: Sequence[Call]) -> WorkflowOutput:
    """The output with the text of the last recorded reply in its metadata, for the judge."""
    if not calls or "last_reply" in output.metadata:
        return output
    text = calls[-1].response.get("content") or ""
    return output.model_copy(update={"metadata": {**output.metadata, "last_reply": text}})
