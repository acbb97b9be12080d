"""Names to environments, Gymnasium in text, and actions out of what a model wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from astuner.env.actions import extract_action
from astuner.env.gymnasium_text import GymnasiumText
from astuner.env.protocol import action_text
from astuner.env.registry import described, environment_folders, find_environment
from astuner.errors import ConfigError, EnvError, LoadingError

gymnasium = pytest.importorskip("gymnasium", reason="comes with the extra test")
LAKE = ("left", "down", "right", "up")


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("right", 2),
        ("RIGHT.", 2),
        ("2", 2),
        ("I could go left, but down is better: down", 1),
        ("<action>up</action> since right is a hole", 3),
        ("Thought: right looks bad\nAction: left", 0),
        ("so the answer is \\boxed{down}", 1),
        ("upright", None),
        ("7", None),
        ("-1", None),
        ("9" * 5000, None),
        ("1.5", None),
        ("", None),
        ("<action>jump</action> right", None),
    ],
)
def test_extract_action(text: str, action: int | None) -> None:
    assert extract_action(text, LAKE) == action


def test_longer_names_win() -> None:
    assert extract_action("turn left", {"left": 0, "turn left": 1}) == 1


def made(name: str, **params: Any) -> Any:
    return find_environment(name)("t", params)


def test_a_gymnasium_id_is_rendered_with_its_cell_in_brackets() -> None:
    env = made("FrozenLake-v1", is_slippery=False)
    assert env.reset(seed=1) == ("[S]FFF\nFHFH\nFFFH\nHFFG", {"prob": 1})
    shown, reward, terminated, truncated, info = env.step("go right")
    assert shown == "  (Right)\nS[F]FF\nFHFH\nFFFH\nHFFG"
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"prob": 1.0})
    assert env.step(1)[2] is True, "a plain number is an action too, here into the hole"
    assert env.get_info() == "The actions are: left, down, right, up."


def test_a_gymnasium_id_without_text_shows_its_values() -> None:
    env = made("CartPole-v1")
    shown, _ = env.reset(seed=0)
    assert shown == "[0.0137, -0.023, -0.0459, -0.0483]"
    assert env.step("left")[1] == 1.0
    env = made("Pendulum-v1")
    env.reset(seed=0)
    assert env.step("[5, 5]")[4] == {"invalid_action": True}
    assert "invalid_action" not in env.step("Action: [0.5]")[4]
    assert env.action_help == "An action is JSON for Box(-2.0, 2.0, (1,), float32)."


class Mixed(gymnasium.Env[str, Any]):
    """Shows the action that it got, in JSON, and its types."""

    action_space = gymnasium.spaces.Dict(
        {
            "gear": gymnasium.spaces.Discrete(3),
            "wheel": gymnasium.spaces.Box(-1.0, 1.0, (2,)),
            "pair": gymnasium.spaces.Tuple([gymnasium.spaces.Discrete(2)] * 2),
        }
    )

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return "Drive.", {}

    def step(self, action: Any) -> Any:
        kinds = [type(action[key]).__name__ for key in ("gear", "wheel", "pair")]
        return " ".join(kinds), float(action["wheel"][1]), False, False, {}


@pytest.mark.parametrize(
    "action",
    [
        {"gear": 2, "wheel": [0.5, -0.25], "pair": [0, 1]},
        '{"gear": 2, "wheel": [0.5, -0.25], "pair": [0, 1]}',
        {"gear": np.int64(2), "wheel": np.array([0.5, -0.25]), "pair": (0, 1)},
    ],
)
def test_a_dict_is_an_action(action: Any) -> None:
    env = GymnasiumText(Mixed())
    assert env.step(action)[:2] == ("ndarray ndarray tuple", -0.25)
    assert env.step({"gear": 2})[4] == {"invalid_action": True}
    assert env.step({"gear": "x", "wheel": [[1], 2], "pair": 3})[4] == {"invalid_action": True}


def test_a_list_is_an_action() -> None:
    env = made("Pendulum-v1")
    env.reset(seed=0)
    assert "invalid_action" not in env.step([0.5])[4]
    assert env.step([0.5, 0.5])[4] == {"invalid_action": True}


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("up", "up"),
        (None, ""),
        (2, "2"),
        ([0.1, 0.2], "[0.1, 0.2]"),
        (["a", "b"], '["a", "b"]'),
        ((1, 2), "[1, 2]"),
        ({"a": 1}, '{"a": 1}'),
        ([{"x": 1}], '[{"x": 1}]'),
        (np.array([1.0, 2.0]), "[1.0, 2.0]"),
        ({"role": "assistant", "content": None}, ""),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "go "}, {"text": "up"}]},
            "go up",
        ),
        ([{"type": "text", "text": "go"}], "go"),
    ],
)
def test_the_text_of_an_action(action: Any, text: str) -> None:
    assert action_text(action) == text


def test_a_step_limit_truncates() -> None:
    env = made("FrozenLake-v1", is_slippery=False, max_episode_steps=1)
    env.reset(seed=0)
    assert env.step("left")[2:4] == (False, True)


def test_a_class_of_gymnasium() -> None:
    maker = find_environment("gymnasium.envs.toy_text.cliffwalking->CliffWalkingEnv")
    env = maker("t", {"seed": 1})
    assert isinstance(env, GymnasiumText)
    assert str(env.reset(seed=1)[0]).splitlines()[-1].startswith("x  C")


def test_a_class_and_a_file() -> None:
    env: Any = find_environment("tests.env.worlds->Counting")("t", {})
    assert env.reset()[1] == {"goal": 2}
    env.close()
    file = Path(__file__).parent / "worlds.py"
    assert find_environment(f"{file}->Counting").__name__ == "Counting"  # pyright: ignore


def test_folders() -> None:
    folders = environment_folders()
    assert "toy_text" in folders
    assert described(folders["toy_text"]).startswith("Gymnasium's toy text games in words")


def test_a_folders_files_may_import_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders may have files of the same name."""
    for name in ("left_world", "right_world"):
        folder = tmp_path / "envs" / name
        folder.mkdir(parents=True)
        (folder / "part.py").write_text(f"NAME = {name!r}\n")
        (folder / "environment.py").write_text(
            "from .part import NAME\n\n\ndef make(task_id, params):\n    return NAME\n"
        )
    monkeypatch.chdir(tmp_path)
    assert find_environment("left_world")("t", {}) == "left_world"
    assert find_environment("right_world")("t", {}) == "right_world"


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("FrozenLak-v1", ConfigError, "Did you mean FrozenLake-v1"),
        ("toy_txt", ConfigError, "Did you mean toy_text"),
        ("tests.env.worlds->Nobody", LoadingError, "has no 'Nobody'"),
        ("tests.env.worlds->LIMIT", ConfigError, "it must be a class or function"),
    ],
)
def test_names_that_lead_nowhere(name: str, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        find_environment(name)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(EnvError, match="no_such") as caught:
        made("FrozenLake-v1", no_such=1)
    assert caught.value.cause == "refused"
