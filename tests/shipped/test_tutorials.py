"""Each tutorial runs a few steps with its own config, and its small functions are right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from astuner import Task, WorkflowOutput, WorkflowTask
from astuner.cli import main
from astuner.config.load import load_config
from tutorial.example_arithmetic.arithmetic_agent import BareNumberJudge
from tutorial.example_math_agent.math_agent import last_number
from tutorial.example_math_agent.math_agent_simplify import (
    SHOWN,
    MathToolWorkflow,
    boxed,
    calculate,
    same_number,
)

from .artefacts import GSM8K, PROBLEMS, ROOT, gsm8k_folder, name_of, offline_datasets, tiny


def run(config: str, runs: Path, *overrides: str) -> dict[str, Any]:
    """Tune with a shipped config; the run's summary."""
    assert main(["--conf", str(ROOT / config), "--exp-dir", str(runs), *overrides]) == 0
    (run_dir,) = runs.iterdir()
    return json.loads((run_dir / "summary.json").read_text())


EXAMPLES = sorted((ROOT / "tutorial").glob("example_*"))


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_an_example_is_whole(folder: Path) -> None:
    """Workflow, configuration, README with both commands, and a line in the list."""
    text = (folder / "README.md").read_text()
    configs = [name_of(path) for path in folder.glob("*.yaml")] or ["configs/quickstart.yaml"]
    for config in configs:
        assert f"astuner --conf {config} --backbone debug" in text
        assert re.search(rf"^astuner --conf {config}( .*)?$", text, re.MULTILINE)
        workflow = load_config(ROOT / config).config.rollout.user_workflow
        module = workflow.partition("->")[0]
        assert module.startswith(f"tutorial.{folder.name}.")
        assert f"`{module.rpartition('.')[2]}.py`" in text
    assert f"({folder.name}/README.md)" in (ROOT / "tutorial" / "README.md").read_text()
    recorded = ("learning_curve.png", "benchmarks/results/quickstart.md")
    assert any(name in text for name in recorded) or "No learning curve has been recorded" in text


def check(summary: dict[str, Any], episodes: int) -> None:
    assert summary["steps"] == 2
    assert summary["episodes"] == episodes
    assert summary["episodes_failed"] == 0
    assert summary["tokens_sampled"] > episodes
    assert summary["eval_episodes"] == 2
    assert Path(summary["checkpoint"], "adapter_model.safetensors").is_file()


def test_arithmetic(tiny_model_dir: Path, tmp_path: Path) -> None:
    check(run("configs/quickstart.yaml", tmp_path / "runs", *tiny(tiny_model_dir)), episodes=8)


@pytest.mark.parametrize("name", ["products", "calculator"])
def test_maths_agent_on_two_cores(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = f"tutorial/example_math_agent/{name}.yaml"
    check(run(config, tmp_path / "runs", *tiny(tiny_model_dir)), episodes=8)


MATHS = "tutorial/example_math_agent/gsm8k.yaml"


def test_maths_agent(tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    offline_datasets(tmp_path / "cache", monkeypatch)
    data = gsm8k_folder(tmp_path / "gsm8k", PROBLEMS)
    check(run(MATHS, tmp_path / "runs", *tiny(tiny_model_dir), *data), episodes=8)


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"the real GSM8K rows are not at {GSM8K}")
def test_maths_agent_over_the_real_rows(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    offline_datasets(tmp_path / "cache", monkeypatch)
    hub = "task_reader.huggingface_dat_repo"
    data = [f"{hub}.dataset_path={GSM8K}", f"{hub}.dataset_name=", "data.max_prompt_length=900"]
    check(run(MATHS, tmp_path / "runs", *tiny(tiny_model_dir), *data), episodes=8)


# ---------------------------------------------------------------- their functions


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (" 12 * 7 ", "84"),
        ("(1 + 2) * -3", "-9"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("1234567 * 10", "12345670"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.3333333333"),
    ],
)
def test_calculate(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "1 / 0",
        "2 +",
        "x + 1",
        "2 ** 99999999",
        "__import__('os')",
        "(" * 500,
        "-" * 100_000 + "1",
        "9" * 400 + " / 2",
        "1e308 * 10",
        "",
        "1\x00",
    ],
)
def test_what_cannot_be_calculated_is_told(expression: str) -> None:
    assert calculate(expression).startswith("error: ")


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("1,000", "1000", True),
        ("18.0", "18", True),
        (" 18 ", "18", True),
        ("$18", "18", True),
        ("18", "19", False),
        ("", "18", False),
        ("nan", "18", False),
        ("a half", "a half", True),
    ],
)
def test_same_number(answer: str, reference: str, same: bool) -> None:
    assert same_number(answer, reference) is same


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4 * 5 = 20", "20"),
        ("The answer is \\boxed{-1,234.50}.", "-1,234.50"),
        ("12, or 13.", "13"),
        ("none", ""),
    ],
)
def test_the_last_number(text: str, number: str) -> None:
    assert last_number(text) == number


class Script:
    """A tuner whose model says these lines, one a turn, and keeps what it was asked."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.asked = list(lines), list[list[dict[str, str]]]()
        self.chat = self.completions = self

    def as_raw_openai_sdk_client(self) -> Any:
        return self

    async def create(self, *, model: str, messages: list[dict[str, str]]) -> Any:
        self.asked.append([*messages])
        message = SimpleNamespace(content=self.lines.pop(0))
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])


@pytest.mark.parametrize(
    ("lines", "turns", "reward"),
    [
        (["calc: 47 * 83", "\\boxed{3901}"], 2, 1.0),
        (["\\boxed{3901}"], 1, 1.0),
        (["calc: 47 * 83", "\\boxed{84}"], 2, 0.2),
        (["\\boxed{84}"], 1, 0.1),
        (["calc: 47 * ", "calc: 47", "It is", "3901"], 4, 0.1),
        (["calc: x", "Hm", "Hm", "Hm"], 4, 0.0),
    ],
)
async def test_the_calculators_episode(lines: list[str], turns: int, reward: float) -> None:
    task = Task(main_query="47 * 83?", metadata={"answer": "3901"})
    episode = WorkflowTask(task=task, task_id="0", episode_id="e", repeat_index=0, split="train")
    tuner: Any = Script(*lines)
    output = await MathToolWorkflow().execute(episode, tuner)
    assert len(tuner.asked) == turns
    assert output.reward == pytest.approx(reward)
    assert output.is_success is (reward == 1.0)
    assert [m["content"] for m in tuner.asked[0][1:]] == [
        *(m["content"] for m in SHOWN),
        "47 * 83?",
    ]
    if lines[0] == "calc: 47 * 83":
        assert tuner.asked[1][-1]["content"] == "3901"


def test_what_is_boxed() -> None:
    assert boxed("so \\boxed{ 84 }.") == " 84 "
    assert boxed("84") == ""


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (" 7\n", (1.0, True)),
        ("8", (0.1, False)),
        ("-8", (0.1, False)),
        ("7.", (0.0, False)),
        ("The answer is 7", (0.0, False)),
        (None, (0.0, False)),
    ],
)
async def test_the_arithmetic_judge(reply: str | None, verdict: tuple[float, bool]) -> None:
    task = Task(main_query="3 + 4", metadata={"answer": "7"})
    episode = WorkflowTask(task=task, task_id="0", episode_id="e", repeat_index=0, split="train")
    output = WorkflowOutput(metadata={"final_answer": reply})
    assert await BareNumberJudge().compute_reward(episode, output) == verdict
