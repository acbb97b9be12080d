"""Who gets the thread, and for how long: with fakes, and a clock that they move."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator

import pytest

from astuner.engine.embedded.device_thread import DeviceThread
from astuner.errors import EngineError

pytestmark = pytest.mark.timeout(30)
SECONDS = 20.0


class World:
    """A clock; a sampler whose ticks take a second each; a verb whose steps take longer."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []
        self.ticks_left = 0
        self.failures: list[str] = []

    def clock(self) -> float:
        return self.now

    @property
    def has_work(self) -> bool:
        return self.ticks_left > 0

    def tick(self) -> None:
        self.now += 1
        self.ticks_left -= 1
        self.events.append("tick")

    def fail_tick(self, error: EngineError) -> None:
        self.failures.append(str(error))

    def fail_all(self, error: EngineError) -> None:
        self.failures.append(str(error))

    def train(self, steps: int, seconds: float, ticks: int = 0) -> Generator[None, None, str]:
        """The first step gives the sampler work."""
        for step in range(steps):
            self.ticks_left += ticks if step == 0 else 0
            self.now += seconds
            self.events.append("step")
            yield
        return "done"


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def thread(world: World) -> Iterator[DeviceThread]:
    thread = DeviceThread(world.clock)
    thread.sampler = world
    yield thread
    thread.close()


def test_after_a_step_the_sampler_has_as_long(world: World, thread: DeviceThread) -> None:
    training = thread.submit("train", lambda: world.train(4, 8.0, ticks=20))
    assert training.result(SECONDS) == "done"
    step = ["step"]
    assert world.events == step + 8 * ["tick"] + step + 8 * ["tick"] + step + 4 * ["tick"] + step


def test_a_tick_longer_than_a_step_is_one_tick(world: World, thread: DeviceThread) -> None:
    assert thread.submit("train", lambda: world.train(3, 0.1, ticks=9)).result(SECONDS) == "done"
    assert world.events[:5] == ["step", "tick", "step", "tick", "step"]


def test_lanes_take_turns_and_the_sampler_between(world: World, thread: DeviceThread) -> None:
    begun = threading.Event()
    hold = thread.submit("hold", lambda: begun.wait(SECONDS))
    both = [
        thread.submit("train", lambda: world.train(2, 3.0, ticks=6), lane=lane) for lane in "ab"
    ]
    begun.set()
    assert [job.result(SECONDS) for job in (hold, *both)] == [True, "done", "done"]
    assert world.events[:16] == (["step"] + 3 * ["tick"]) * 4


def test_a_job_that_nobody_waits_for_ends_at_its_next_step(
    world: World, thread: DeviceThread
) -> None:
    begun, cancelled, closed = threading.Event(), threading.Event(), threading.Event()

    def train() -> Generator[None, None, None]:
        try:
            begun.set()
            assert cancelled.wait(SECONDS)
            world.events.append("step")
            yield
            world.events.append("step")
            yield
        finally:
            closed.set()

    job = thread.submit("train", train)
    behind = thread.submit("behind", lambda: "its turn")
    assert begun.wait(SECONDS)
    assert not job.cancel()  # it has begun
    cancelled.set()
    assert behind.result(SECONDS) == "its turn"
    assert closed.is_set() and world.events == ["step"]
    with pytest.raises(EngineError, match="train was given up"):
        job.result(SECONDS)


def test_a_post_that_raises_fails_the_sampler_and_not_the_thread(
    world: World, thread: DeviceThread
) -> None:
    def post() -> None:
        raise KeyError("a bug")

    thread.post(post)
    assert thread.submit("next", lambda: 3).result(SECONDS) == 3
    assert thread.alive
    (failure,) = world.failures
    assert "KeyError: 'a bug'" in failure


def test_where_a_failed_tick_cannot_be_tidied_up_all_hear_of_its_cause(
    world: World, thread: DeviceThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def post() -> None:
        raise KeyError("the cause")

    def fail_tick(error: EngineError) -> None:
        raise RuntimeError("the device takes no work")

    monkeypatch.setattr(world, "fail_tick", fail_tick)
    thread.post(post)
    assert thread.submit("next", lambda: 3).result(SECONDS) == 3
    (failure,) = world.failures
    assert "KeyError: 'the cause'" in failure
