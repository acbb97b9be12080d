"""What a person sees of a run: plain lines without a terminal, a live line with one."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console

from astuner.tracking import RunDisplay

from .records import episode, failed


@dataclass
class Result:
    score: float
    num: int


def plain() -> tuple[RunDisplay, io.StringIO]:
    """Its clock stands still."""
    out = io.StringIO()
    return RunDisplay(Console(file=out, width=100), step_lines=True, clock=lambda: 0.0), out


def test_plain_lines_where_there_is_no_terminal() -> None:
    display, out = plain()
    display.stage("loading the model")
    display.stage("eval", 0, 4)
    display.evaluated(0, Result(0.125, 64))
    display.stage("rollout", 1, 4)
    display.step_done(1, 4, {"reward/mean": 0.25})
    display.note("Step 1 trained nothing.")
    display.close()
    display.close()
    assert out.getvalue().splitlines() == [
        "loading the model ...",
        "validating ...",
        "held-out score after 0 steps: 0.125 (mean of 64)",
        "step    1  reward 0.250  of 4, 0 s left",
        "Step 1 trained nothing.",
    ]


def test_rewards_of_several_targets_stand_behind_the_reward() -> None:
    display, out = plain()
    metrics = {"reward/mean": 0.25, "reward/wolf/mean": 1.0, "reward/villager/mean": -0.5}
    display.step_done(1, 4, metrics | {"tokens/wolf/trained": 3.0, "reward/wolf/std": 0.1})
    line = "step    1  reward 0.250  wolf 1.000  villager -0.500  of 4, 0 s left"
    assert out.getvalue().splitlines() == [line]


def test_the_first_failure_of_a_kind_is_shown_in_full() -> None:
    display, out = plain()
    for ended in (episode(), failed(), failed(), failed()):
        display.episode(ended)
    text = out.getvalue()
    assert text.count("Episode e1 failed (workflow): execute raised KeyError: 'x'") == 1
    assert text.count("line 3") == 1


def test_text_of_users_is_not_read_as_markup() -> None:
    display, out = plain()
    display.note("list [/] of [bold]")
    assert out.getvalue() == "list [/] of [bold]\n"


def test_a_terminal_gets_stage_step_reward_speed_and_time_left() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with RunDisplay(console, episodes={"rollout": 64}) as display:
        assert out.getvalue() == ""  # nothing live before the first stage
        display.stage("rollout", 1, 40)
        display.advance(12)
        display.episode(failed())
        display.evaluated(0, Result(0.5, 64))
        display.step_done(1, 40, {"reward/mean": 0.25, "speed/sampled_tokens_per_second": 532.0})
        display._progress.refresh()
    text = out.getvalue()
    shown_cursor, hidden_cursor = "\x1b[?25h", "\x1b[?25l"
    assert text.count(shown_cursor) == text.count(hidden_cursor) == 1
    for said in ("rolling out", "13/64 episodes", "1/40", "0.250", "532 tok/s", "left", "0.500"):
        assert said in text
    assert "1 failed" in text


def test_a_new_stage_does_not_inherit_the_count_of_the_last() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with RunDisplay(console, episodes={"rollout": 64}) as display:
        display.stage("rollout", 1, 40)
        display.stage("train", 1, 40)
        display._progress.refresh()
        assert [(t.description, t.total) for t in display._progress.tasks] == [
            ("step", 40),
            ("training", None),
        ]


def test_the_time_left_is_that_of_the_latest_steps() -> None:
    # loading and the first validation, until 100, are not steps
    times = iter([100.0, 110.0, 130.0])
    out = io.StringIO()
    display = RunDisplay(Console(file=out, width=100), step_lines=True, clock=lambda: next(times))
    display.stage("rollout", 1, 10)
    display.step_done(1, 10, {})
    display.step_done(2, 10, {})
    assert out.getvalue().splitlines() == [
        "step    1  of 10, 1 min 30 s left",  # 9 steps of 10 s
        "step    2  of 10, 2 min 00 s left",  # 8 of 15
    ]
