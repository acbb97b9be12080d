"""The one thread on which all torch work of an embedded model happens.

It sleeps when there is nothing to do, ticks the sampler while sequences run, and
runs jobs (training verbs): those of one lane one after the other, lanes taking turns.
A job that is a generator is advanced one step at a time. Sampler and jobs share the
time: after a step the sampler has as long as the step took. This is the engine's
error boundary: what a job raises goes to its caller, what a tick raises fails the
requests it was for, and the thread lives on. It knows neither models nor sequences.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch

from astuner.errors import EngineClosed, EngineError

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A long job: yields where something else may run."""


class Sampler(Protocol):
    """What the thread ticks."""

    @property
    def has_work(self) -> bool: ...
    def tick(self) -> None: ...
    def fail_tick(self, error: EngineError) -> None: ...
    def fail_all(self, error: EngineError) -> None: ...


class Answer(Future[T]):
    """A job's future. Cancelling it ends a job that has begun too, before its next step."""

    wanted = True

    def cancel(self) -> bool:
        self.wanted = False
        return super().cancel()


@dataclass(slots=True)
class _Job:
    name: str
    verb: Callable[[], Any]
    future: Answer[Any]
    lane: str
    steps: Generator[None, None, Any] | None = None


class DeviceThread:
    """Runs jobs and ticks until closed. All methods may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.sampler: Sampler | None = None
        """Set by the first job, which builds it."""
        self.doing = "idle"
        """What the thread is at right now, for a watchdog."""
        self.last_beat = clock()
        """When it last turned to something new."""
        self._owed = 0.0
        """Seconds that the last step of a job took."""
        self._lock = threading.Lock()
        self._closed = False
        self._posts: deque[Callable[[], None]] = deque()
        self._lanes: dict[str, deque[_Job]] = {}
        """None is empty. The first job of a lane is at hand; the first lane is next."""
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="astuner-device", daemon=True)
        self._thread.start()

    def submit(self, name: str, verb: Callable[[], T | Steps[T]], lane: str = "") -> Answer[T]:
        """Queue a job behind the others of its lane; its future gets the result.

        Raises EngineClosed.
        """
        future: Answer[T] = Answer()
        with self._lock:
            self._refuse_if_closed()
            self._lanes.setdefault(lane, deque()).append(_Job(name, verb, future, lane))
        self._wake.set()
        return future

    def post(self, action: Callable[[], None]) -> None:
        """Run something short of the sampler's before its next tick; should it raise, the
        sampler fails as if in a tick. Raises EngineClosed."""
        with self._lock:
            self._refuse_if_closed()
            self._posts.append(action)
        self._wake.set()

    def close(self, timeout: float = 30.0) -> None:
        """Stop after the step at hand; whoever still waits gets EngineClosed."""
        with self._lock:
            self._closed = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    @property
    def queued(self) -> int:
        """Jobs that are not done."""
        with self._lock:
            return sum(len(jobs) for jobs in self._lanes.values())

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineClosed("The embedded model was closed; load it again to go on.")

    def _run(self) -> None:
        try:
            while not self._closed:
                self._wake.clear()
                sampled = self._sample()
                if not self._step_job() and not sampled:
                    self._beat("idle")
                    self._wake.wait()
        finally:
            self._fail_everything()

    def _beat(self, doing: str) -> None:
        self.doing, self.last_beat = doing, self._clock()

    def _run_posts(self) -> None:
        while self._posts:
            self._guarded(self._posts.popleft())

    def _sample(self) -> bool:
        """Tick while the sampler has work and is owed time, once at least; whether it had."""
        self._run_posts()
        begun, ticked = self._clock(), False
        while self._tick():
            ticked = True
            self._run_posts()
            if self._closed or self._clock() - begun >= self._owed:
                break
        return ticked

    def _tick(self) -> bool:
        """One tick of the sampler, if it has work."""
        if self.sampler is None or not self.sampler.has_work:
            return False
        self._beat("sampling")
        self._guarded(self.sampler.tick)
        return True

    def _guarded(self, action: Callable[[], None]) -> None:
        """A failure fails the requests it was for."""
        try:
            action()
        except Exception as error:
            if self.sampler is not None:
                _fail_tick(self.sampler, _as_engine_error("sampling", error))

    def _step_job(self) -> bool:
        """Start or advance the job at hand of the next lane; False if there is none."""
        job = self._take_turn()
        self._owed = 0.0
        if job is None:
            return False
        if not self._is_wanted(job):
            self._finish(job)
            return True
        self._beat(job.name)
        try:
            done, result = _advance(job)
        except Exception as error:
            self._finish(job)
            job.future.set_exception(_named_if_out_of_memory(job.name, error))
        else:
            if done:
                self._finish(job)
                job.future.set_result(result)
        self._owed = self._clock() - self.last_beat
        return True

    def _is_wanted(self, job: _Job) -> bool:
        """Whether somebody still waits for it; if not, it is over."""
        if job.steps is None:
            return job.future.set_running_or_notify_cancel()
        if not job.future.wanted:
            job.steps.close()
            job.future.set_exception(EngineError(f"{job.name} was given up before its end."))
        return job.future.wanted

    def _take_turn(self) -> _Job | None:
        with self._lock:
            if not self._lanes:
                return None
            lane = next(iter(self._lanes))
            jobs = self._lanes[lane] = self._lanes.pop(lane)  # to the end of the queue
            return jobs[0]

    def _finish(self, job: _Job) -> None:
        with self._lock:
            jobs = self._lanes[job.lane]
            jobs.popleft()
            if not jobs:
                del self._lanes[job.lane]

    def _fail_everything(self) -> None:
        with self._lock:
            self._closed = True
        error = EngineClosed("The embedded model was closed while this call was waiting.")
        self._run_posts()
        if self.sampler is not None:
            self.sampler.fail_all(error)
        for job in [job for jobs in self._lanes.values() for job in jobs]:
            if job.steps is not None:
                job.steps.close()
                job.future.set_exception(error)
            elif job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
        self._beat("closed")


def _advance(job: _Job) -> tuple[bool, Any]:
    """Call the verb, or take its next step: (whether it is done, its result)."""
    if job.steps is None:
        result = job.verb()
        if not isinstance(result, Generator):
            return True, result
        job.steps = cast("Generator[None, None, Any]", result)
    try:
        next(job.steps)
    except StopIteration as stop:
        return True, stop.value
    return False, None


def _fail_tick(sampler: Sampler, error: EngineError) -> None:
    """After some failures the device takes no work at all, not even to tidy up."""
    try:
        sampler.fail_tick(error)
    except Exception:
        sampler.fail_all(error)


def _as_engine_error(doing: str, error: Exception) -> EngineError:
    named = _named_if_out_of_memory(doing, error)
    if isinstance(named, EngineError):
        return named
    result = EngineError(
        f"The embedded model failed while {doing}: {type(error).__name__}: {error}"
    )
    result.__cause__ = error
    return result


def _named_if_out_of_memory(doing: str, error: Exception) -> Exception:
    """An out-of-memory error as an EngineError that says what to lower; others unchanged."""
    if not is_out_of_memory(error):
        return error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    seen = str(error).partition("\n")[0]
    result = EngineError(
        f"Out of memory while {doing} ({seen}). Lower rollout.max_num_seqs, "
        "rollout.kv_cache_tokens or rollout.max_model_len for sampling, "
        "trainer_common.micro_batch_tokens or set trainer_common.gradient_checkpointing for "
        "training, or take a smaller model."
    )
    result.__cause__ = error
    return result


def is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in text or "not enough memory" in text)
    )
