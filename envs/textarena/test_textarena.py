"""Games played to their known ends: alone, and against opponents."""

from __future__ import annotations

import random
from typing import Any

import pytest

from astuner.env.registry import find_environment
from astuner.errors import EnvError

pytest.importorskip("textarena", reason="the environment's own requirements.txt")
HERE = "envs.textarena.test_textarena"


def game(name: str, **params: Any) -> Any:
    return find_environment("textarena")("t", {"game": name, **params})


def first_free(shown: str) -> str:
    """An opponent that takes the first cell that is free."""
    return shown.rpartition("Available Moves: ")[2].partition("'")[2].partition("'")[0]


def test_a_puzzle_for_one() -> None:
    env = game("GuessTheNumber-v0", max_number=8)
    shown, info = env.reset(seed=3)
    assert shown.startswith("You are Player 0. You are playing Guess The Number.")
    assert "between 1 and 8" in shown
    assert info == {"players": 1}
    assert env.step("maybe [1]")[:4] == ("The target number is higher.", 0.0, False, False)
    number = env._env.game_number
    assert 1 < number <= 8
    shown, reward, terminated, truncated, told = env.step(f"<action>{number}</action>")
    assert shown == "Congratulations! You guessed the correct number."
    assert (reward, terminated, truncated, told["turn_count"]) == (1.0, True, False, 2)


def test_the_second_invalid_move_ends_it() -> None:
    env = game("TowerOfHanoi-v0")
    env.reset(seed=0)
    told, reward, ended, _, _ = env.step("[A B C]")
    assert "invalid move" in told
    assert (reward, ended) == (0.0, False)
    _, _, ended, _, told = env.step("[A B C]")
    assert ended
    assert told["invalid_move"] is True


@pytest.mark.parametrize(
    ("moves", "reward", "reason"),
    [
        (["[8]", "[7]", "[6]"], 1.0, "Player 0 has won!"),  # against 0, 1
        (["[8]", "[4]", "[5]"], -1.0, "Player 1 has won!"),  # 0, 1, 2 wins
    ],
)
def test_against_an_opponent_of_ones_own(moves: list[str], reward: float, reason: str) -> None:
    env = game("TicTacToe-v0", opponent=f"{HERE}->first_free")
    shown, info = env.reset(seed=1)
    assert "You are Player 0 in Tic Tac Toe." in shown
    assert info == {"players": 2}
    first = env.step(moves[0])
    assert "Player 1 placed their symbol (X) in cell 0." in first[0]
    assert moves[0] not in first[0].splitlines(), "its own words are not shown to a player"
    assert first[1:4] == (0.0, False, False)
    assert env.step(moves[1])[2] is False
    last = env.step(moves[2])
    assert last[1:4] == (reward, True, False)
    assert last[0].endswith(reason)


def test_the_other_seat() -> None:
    env = game("TicTacToe-v0", opponent=f"{HERE}->first_free", player=1)
    shown, _ = env.reset(seed=1)
    assert "You are Player 1" in shown
    assert "Player 0 placed their symbol (O) in cell 0." in shown


def test_a_random_opponent_keeps_to_the_rules() -> None:
    for seed in range(10):
        env = game("TicTacToe-v0", player=seed % 2)
        shown, _ = env.reset(seed=seed)
        rewards, ended = 0.0, False
        while not ended:
            shown, reward, ended, _, told = env.step(first_free(shown))
            rewards += reward
        assert not told["invalid_move"], told
        assert "invalid" not in told["reason"]
        assert rewards in (-1.0, 0.0, 1.0)


def test_a_seed_is_a_game_whatever_else_is_played() -> None:
    alone, other, among = (game("Mastermind-v0") for _ in range(3))
    alone.reset(seed=5)
    random.seed(7)
    expected = random.Random(7).random()
    among.reset(seed=5)
    other.reset(seed=6)
    assert random.random() == expected, "the process's own numbers are left alone"
    codes = [env._env.state.game_state["secret_code"] for env in (alone, among, other)]
    assert codes[0] == codes[1] != codes[2]
    among.reset()
    assert among._env.state.game_state["secret_code"] == codes[0], "no seed: the same again"


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"game": "Poker-v9"}, "has no 'Poker-v9'. It has: 2048, Alquerque"),
        ({"game": "TicTacToe-v0", "moons": 2}, "cannot make TicTacToe-v0 with {'moons': 2}"),
        ({"game": "TicTacToe-v0", "opponent": "clever"}, "no opponent 'clever'"),
        ({"game": "TicTacToe-v0", "players": 3}, "Set players"),
        ({"game": "ConnectFour-v0", "player": 1}, "lists no moves"),
    ],
)
def test_what_cannot_be_played_is_refused(params: dict[str, Any], told: str) -> None:
    with pytest.raises(EnvError) as caught:
        game(params.pop("game"), **params).reset(seed=0)
    assert told in str(caught.value)
    assert not caught.value.retriable
