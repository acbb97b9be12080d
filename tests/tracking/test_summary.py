"""summary.json, the final table, the learning curve and the coloured tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from astuner.tracking import (
    MetricSinks,
    colored_tokens,
    learning_curve,
    legend,
    next_commands,
    summary_table,
    write_summary,
)
from astuner.tracking.curve import curve_targets, smooth
from astuner.tracking.summary import duration

from .records import sample


def test_summary_replaces_the_old_one_whole(tmp_path: Path) -> None:
    write_summary(tmp_path, {"steps": 1})
    path = write_summary(tmp_path, {"steps": 40, "run_dir": tmp_path})
    assert json.loads(path.read_text()) == {"steps": 40, "run_dir": str(tmp_path)}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_the_table_says_before_after_where_and_what_next() -> None:
    console = Console(record=True, width=100)
    summary = {
        "model": "smollm2-135m",
        "steps": 40,
        "eval_before": 0.0,
        "eval_after": {"score": 0.5625, "num": 64},
        "train_seconds": 199.3,
        "tokens_sampled": 25000,
        "tokens_masked_by_reason": {"context": 12000, "too_long": 0},
    }
    places = {"tuned adapter": Path("/runs/q/adapter")}
    console.print(summary_table(summary, places=places))
    words = " ".join(console.export_text().replace("\u2502", " ").split())
    for said in (
        "before after change held-out score 0.000 0.562 +0.562",
        "steps 40",
        "training time 3 min 19 s",
        "tokens sampled 25,000",
        "tokens not trained 12,000 context",
        "tuned adapter /runs/q/adapter",
    ):
        assert said in words


def test_commands_can_be_copied_however_narrow_the_terminal() -> None:
    console = Console(record=True, width=20)
    console.print(next_commands([("talk", "astuner chat runs/a_long_name")]), soft_wrap=True)
    assert console.export_text() == "Next\n  # talk\n  astuner chat runs/a_long_name\n"


def test_the_table_of_a_run_that_validated_nothing() -> None:
    console = Console(record=True, width=100)
    console.print(summary_table({"steps": 2, "eval_before": None}))
    assert "held-out score" in console.export_text()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (199, "3 min 19 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_smoothing_by_hand() -> None:
    assert smooth([1.0, 1.0, 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    # (0.7 * 0.3 * 0 + 0.3 * 1) / (1 - 0.49)
    assert smooth([0.0, 1.0]) == pytest.approx([0.0, 0.3 / 0.51])


def curve_of(run_dir: Path, metrics: dict[str, float]) -> Path | None:
    sinks = MetricSinks([], run_dir, "p", "e", {})
    sinks.log(1, metrics)
    sinks.close()
    return learning_curve(run_dir)


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = curve_of(tmp_path, {"reward/mean": 0.5, "eval/score": 0.25})
    assert path == tmp_path / "learning_curve.png"
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1200, 675)


def test_each_target_has_a_line_of_its_own(tmp_path: Path) -> None:
    plain = curve_of(tmp_path, {"reward/mean": 0.5})
    assert plain is not None
    without = plain.read_bytes()
    rewards = {"reward/mean": 0.5, "reward/wolf/mean": 1.0, "reward/villager/mean": 0.25}
    assert curve_targets({1: rewards, 2: {"reward/wolf/mean": 0.5}}) == {
        "villager": [(1, 0.25)],
        "wolf": [(1, 1.0), (2, 0.5)],
    }
    path = curve_of(tmp_path, rewards)
    assert path is not None
    assert path.read_bytes() != without


def test_no_curve_without_rewards_or_metrics(tmp_path: Path) -> None:
    assert learning_curve(tmp_path) is None
    assert curve_of(tmp_path, {"policy/loss": 0.5}) is None


def test_no_curve_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert curve_of(tmp_path, {"reward/mean": 0.5}) is None


def decode(ids: object) -> str:
    return bytes(ids).decode("utf-8", "replace")


def test_tokens_are_coloured_by_mask_and_probability() -> None:
    text = b"Q?\n5x\xe2\x82\xac"
    size = len(text)
    mask = np.array([0, 0, 0, 1, 0, 1, 1, 1], bool)
    probabilities = np.array([1, 1, 1, 0.95, 1, 0.05, 1, 1])
    painted = colored_tokens(
        sample(
            token_ids=np.frombuffer(text, np.uint8).astype(np.int32),
            loss_mask=mask,
            logprobs=np.log(probabilities).astype(np.float32),
            spans=np.array([[3, size, 0, 0]], np.int32),
        ),
        decode,
    )
    assert painted.plain == "Q?\u23ce\n5x\u20ac"  # the three bytes of the euro sign are one piece
    spans = [(painted.plain[s.start : s.end], str(s.style)) for s in painted.spans]
    assert spans == [
        ("Q", "grey50"),
        ("?", "grey50"),
        ("\u23ce\n", "grey50"),
        ("5", "black on #a5d6a7"),
        ("x", "italic magenta"),
        ("\u20ac", "black on #ff8a80"),
    ]
    assert "p < 0.1" in legend().plain


def test_logprobs_are_written_behind_trained_tokens() -> None:
    painted = colored_tokens(
        sample(token_ids=np.frombuffer(b"ab78", np.uint8)), decode, logprobs=True
    )
    assert painted.plain == "ab7-0.50 8-0.25 "
