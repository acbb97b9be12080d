"""The four games: what is shown, and games played to their known ends."""

from __future__ import annotations

from typing import Any

import pytest

from astuner.env.registry import find_environment
from astuner.errors import EnvError

pytest.importorskip("gymnasium", reason="the environment's own requirements.txt")
FIRST_LAKE = (
    "You are at row 0, column 0; the goal is at row 3, column 3. "
    "left: edge, down: ice, right: ice, up: edge."
)


def game(name: str, **params: Any) -> Any:
    return find_environment("toy_text")("t", {"game": name, **params})


def play(env: Any, *actions: str) -> tuple[str, float, bool, bool]:
    """The last observation, the sum of the rewards, and how it ended."""
    total, reply = 0.0, ("", 0.0, False, False, {})
    for action in actions:
        reply = env.step(action)
        total += reply[1]
    return reply[0], total, reply[2], reply[3]


def test_frozen_lake() -> None:
    env = game("FrozenLake", map_name="4x4", is_slippery=False)
    assert env.reset(seed=1)[0] == FIRST_LAKE
    assert env.step("Let me go right")[0].endswith("left: ice, down: hole, right: ice, up: edge.")
    assert play(env, "down") == ("You fell into a hole.", 0.0, True, False)
    env.reset(seed=1)
    way = ["down", "down", "right", "right", "down", "right"]
    assert play(env, *way) == ("You reached the goal.", 1.0, True, False)
    env.close()


def test_a_brief_lake() -> None:
    env = game("FrozenLake", map_name="4x4", is_slippery=False, brief=True)
    assert env.reset(seed=1)[0] == "left: edge, down: ice, right: ice, up: edge."
    assert env.step("right")[0] == "left: ice, down: hole, right: ice, up: edge."


def test_a_lake_tells_how_far_the_goal_is() -> None:
    env = game("FrozenLake", map_name="4x4", is_slippery=False)
    assert env.reset(seed=1)[1]["distance"] == 6
    assert [env.step(move)[4]["distance"] for move in ("right", "left", "up", "what?")] == [
        5,
        6,
        6,
        6,
    ]


@pytest.mark.parametrize("brief", [False, True])
def test_a_lake_without_a_goal_tells_no_distance(brief: bool) -> None:
    env = game("FrozenLake", desc=["SF", "FH"], is_slippery=False, brief=brief)
    around = "left: edge, down: ice, right: ice, up: edge."
    shown, info = env.reset(seed=1)
    assert shown == (around if brief else f"You are at row 0, column 0. {around}")
    assert "distance" not in info
    shown, reward, ended, _, info = env.step("right")
    assert shown.endswith("left: ice, down: hole, right: edge, up: edge.")
    assert (reward, ended, "distance" in info) == (0.0, False, False)
    assert play(env, "down") == ("You fell into a hole.", 0.0, True, False)


def test_a_random_lake_belongs_to_its_seed() -> None:
    lakes = [game("FrozenLake", size=5, seed=s, frozen=0.6).env.unwrapped.desc for s in (1, 1, 2)]
    assert lakes[0].shape == (5, 5)
    assert (lakes[0] == lakes[1]).all()
    assert (lakes[0] != lakes[2]).any()


def test_cliff_walking() -> None:
    env = game("CliffWalking")
    shown = env.reset(seed=1)[0]
    assert shown.startswith("You are at row 3, column 0; the goal is at row 3, column 11. up: gro")
    assert "right: cliff" in shown
    assert play(env, "up", *["right"] * 11, "down") == ("You reached the goal.", -13.0, True, False)


def test_taxi() -> None:
    env = game("Taxi")
    env.reset(seed=1)
    env.env.unwrapped.s = env.env.unwrapped.encode(0, 0, 0, 1)  # at red, to green (row 0, column 4)
    shown = env.step("south")[0]
    assert "red at row 0, column 0, green at row 0, column 4" in shown
    assert "The taxi is at row 1, column 0; the passenger is at red and wants" in shown
    way = ["north", "pickup", "south", "south", "east", "east", "east", "east", "north", "north"]
    shown, total, ended, _ = play(env, *way, "dropoff")
    assert (total, ended) == (10.0, True)


def test_blackjack() -> None:
    env = game("Blackjack")
    shown = env.reset(seed=3)[0]
    assert shown.startswith("Your cards sum to ")
    assert shown.endswith("Do you hit or stick?")
    _, reward, ended, _ = play(env, "I stick")
    assert ended
    assert reward in (-1.0, 0.0, 1.0)


def test_what_is_no_action_changes_nothing() -> None:
    env = game("FrozenLake", map_name="4x4", is_slippery=False)
    env.reset(seed=1)
    told = "'jump' is not an action. The actions are: left, down, right, up."
    info = {"invalid_action": True, "distance": 6}
    assert env.step("jump") == (told, 0.0, False, False, info)


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"game": "Chess"}, "no game 'Chess'"),
        ({"game": "Taxi", "moons": 2}, "refused {'moons': 2}"),
    ],
)
def test_what_does_not_exist_is_refused(params: dict[str, Any], told: str) -> None:
    with pytest.raises(EnvError) as caught:
        game(**{"name": params.pop("game"), **params})
    assert told in str(caught.value)
    assert not caught.value.retriable
