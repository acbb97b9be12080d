"""The watchdog speaks when nothing moves, and only then."""

from __future__ import annotations

import threading

from astuner.task_rollout import Watchdog
from astuner.task_runner.live import LiveEpisode


class Scene:
    """A clock, a token counter and two episodes, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tokens = 0
        self.episodes = [
            LiveEpisode("e0", "q0", stage="the judge", since=5.0, where=lambda: "judge.py:7"),
            LiveEpisode("e1", "q1", calls_in_flight=lambda: 2, since=0.0),
        ]
        self.watchdog = Watchdog(
            lambda: self.episodes, lambda: self.tokens, after=10.0, clock=lambda: self.now
        )

    def check_at(self, now: float) -> str | None:
        self.now = now
        return self.watchdog.check()


def test_names_who_waits_for_what_and_since_when() -> None:
    scene = Scene()
    assert scene.check_at(1) is None
    assert scene.check_at(10) is None
    report = scene.check_at(11)
    assert report is not None
    lines = report.splitlines()
    assert lines[0].startswith("Nothing has moved for 10 s")
    assert lines[1:4] == [
        "  e1 (task q1) waits for the workflow (2 LLM calls in flight) since 11 s",
        "  e0 (task q0) waits for the judge since 6 s",
        "    judge.py:7",
    ]
    assert "  MainThread: " in report


def test_speaks_again_after_twice_as_long() -> None:
    scene = Scene()
    scene.check_at(0)
    said = [now for now in range(1, 100) if scene.check_at(now)]
    assert said == [10, 20, 40, 80]


def test_a_token_or_an_ended_episode_is_movement() -> None:
    scene = Scene()
    scene.check_at(0)
    scene.tokens = 1
    assert scene.check_at(12) is None
    scene.episodes.pop()
    assert scene.check_at(24) is None
    assert scene.check_at(34) is not None


def test_is_quiet_while_no_episode_is_live() -> None:
    scene = Scene()
    scene.episodes.clear()
    assert [scene.check_at(now) for now in (0, 50, 500)] == [None, None, None]


def test_its_thread_reports_and_ends() -> None:
    said = threading.Event()
    episodes = [LiveEpisode("e0", "q0")]
    watchdog = Watchdog(lambda: episodes, lambda: 0, after=0.02, report=lambda text: said.set())
    with watchdog:
        assert said.wait(5)
    watchdog._thread.join(5)
    assert not watchdog._thread.is_alive()
