"""The werewolves tutorial: its rules, and two steps of it with its own config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from astuner.cli import main
from astuner.tracking import read_episodes
from tutorial.example_werewolves.make_games import SPLITS, game
from tutorial.example_werewolves.werewolves import Table, is_caught, named, worth

from .artefacts import ROOT, tiny

FOLDER = ROOT / "tutorial" / "example_werewolves"
TABLE = Table(["Ann", "Ben", "Cleo", "Dan", "Eva"], "Cleo", "Ann", "Ben", seer_speaks_first=True)


def test_what_is_heard_in_the_morning() -> None:
    dream = "I had a dream: the werewolf is Cleo."
    assert TABLE.talk("Dan") == f"Ann: {dream}\nCleo: I think that the werewolf is Ben."
    assert TABLE.talk("Ann") == (
        f"Ann is dead and left a note: {dream}\nCleo: I think that the werewolf is Ben."
    )
    assert TABLE.talk("Ben").endswith("Cleo: I think that the werewolf is Dan.")


@pytest.mark.parametrize(
    ("victim", "votes", "caught"),
    [
        ("Dan", ["Cleo", "Cleo"], True),  # and the seer, against the werewolf's own vote
        ("Dan", ["Cleo", "Ben"], False),  # two against two
        ("Dan", [None, None], False),  # one against one
        ("Dan", ["Cleo", None], True),
        ("Ann", ["Cleo", "Cleo", "Ben"], False),  # no seer: two against two
        ("Ann", ["Cleo", "Cleo", None], True),
    ],
)
def test_who_is_caught(victim: str, votes: list[str | None], caught: bool) -> None:
    assert is_caught(TABLE, victim, votes) is caught


def test_what_a_vote_is_worth() -> None:
    assert worth("Cleo", "Cleo", won=True) == 1.0
    assert worth("Cleo", "Cleo", won=False) == 0.6
    assert worth("Ben", "Cleo", won=True) == 0.1
    assert worth(None, "Cleo", won=True) == 0.0


def test_names_are_found_in_replies() -> None:
    assert named("I would eat Eva or Ben.", TABLE.prey) == "Eva"
    assert named("Nobody", TABLE.prey) is None


def test_the_games_are_those_of_the_generator() -> None:
    import random

    for split, number in SPLITS.items():
        rows = (FOLDER / f"games_{split}.jsonl").read_text().splitlines()
        source = random.Random(f"werewolves {split}")
        expected = [{"task_id": f"{split}-{n}", **game(source)} for n in range(number)]
        assert [json.loads(row) for row in rows] == expected


@pytest.mark.timeout(180)
def test_it_runs_and_trains_the_villagers_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = str(FOLDER / "werewolves.yaml")
    overrides = tiny(tiny_model_dir)
    assert main(["--conf", config, "--exp-dir", str(tmp_path), *overrides]) == 0
    summary = json.loads((tmp_path / "werewolves" / "summary.json").read_text())
    assert (summary["steps"], summary["episodes"], summary["episodes_failed"]) == (2, 8, 0)
    rows = read_episodes(tmp_path / "werewolves").to_pylist()
    trained = {tag: sum(r["num_trained"] for r in rows if r["target_tag"] == tag)
               for tag in ("villager", "werewolf")}  # fmt: skip
    assert trained["werewolf"] == 0
    assert trained["villager"] > 0
    assert {v for r in rows if r["target_tag"] == "werewolf" for v in r["weight_versions"]} == {
        -1,
        0,
    }
