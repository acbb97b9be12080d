"""Countdown, learning to ask, feedback, rubric judge, shop: their rules, and two steps each."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import openai
import pytest

from astuner import Task, WorkflowOutput, WorkflowTask
from astuner.cli import main
from astuner.config.load import load_config
from astuner.task_reader import read_tasks
from tutorial.example_countdown.countdown_agent import told, value
from tutorial.example_feedback_tracing.make_traces import traces
from tutorial.example_feedback_tracing.support_agent import FeedbackJudge
from tutorial.example_learning_to_ask.doctor import worth
from tutorial.example_learning_to_ask.make_patients import OPENINGS, visits
from tutorial.example_learning_to_ask.patient import Patient, diagnosis
from tutorial.example_rubric_judge import make_rubric
from tutorial.example_rubric_judge.make_complaints import COMPLAINTS, letters
from tutorial.example_rubric_judge.scripted_judge import CRITERIA, score

from .artefacts import ROOT, tiny

TUTORIAL = ROOT / "tutorial"


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- they run


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["countdown", "learning_to_ask", "feedback_tracing", "webshop"])
def test_two_steps(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    two_steps(name, tiny_model_dir, tmp_path)


@pytest.mark.timeout(180)
def test_two_steps_with_a_judging_model(
    judge_url: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    two_steps("rubric_judge", tiny_model_dir, tmp_path, f"task_judge.llm.base_url={judge_url}")


def two_steps(name: str, model: Path, runs: Path, *more: str) -> None:
    config = TUTORIAL / f"example_{name}" / f"{name}.yaml"
    overrides = [*tiny(model), "data.max_response_length=128", *more]
    assert main(["--conf", str(config), "--exp-dir", str(runs), *overrides]) == 0
    summary = json.loads((runs / name / "summary.json").read_text())
    assert (summary["steps"], summary["episodes"], summary["episodes_failed"]) == (2, 8, 0)
    assert summary["eval_episodes"] == 2


# ---------------------------------------------------------------- countdown


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("3 * 19", "57"),
        (" 19 - 3\n", "16"),
        ("3 - 19", "-16"),
        ("3 + 19 =", None),
        ("3 * 19 * 1", None),
        ("57", None),
        ("3, 19", None),
        ("", None),
    ],
)
def test_what_an_expression_makes(text: str, made: str | None) -> None:
    assert value(text, [19, 3]) == made


def test_what_is_told_of_a_miss() -> None:
    assert told("22", [3, 19], 57) == "That makes 22, not 57. Try again."
    assert told(None, [3, 19], 57) == "That is no expression of 3 and 19. Try again."


# ---------------------------------------------------------------- learning to ask


def test_the_patient_tells_what_is_asked_for() -> None:
    patient = Patient("flu")
    assert patient.reply("Any fever?") == "Yes, I have a fever."
    assert patient.reply("Did you EAT well?") == "No, I ate nothing bad."
    assert patient.reply("How are you?") is None
    assert Patient("stress").reply("Any fever?") == "No, I have no fever."


def test_a_diagnosis_names_one_illness() -> None:
    assert diagnosis("Flu.") == "flu"
    assert diagnosis("flu or stress") is None
    assert diagnosis("rest") is None


FEVER, NO_FEVER = "Yes, I have a fever.", "No, I have no fever."
FED, RESTED = "No, I ate nothing bad.", "No, I sleep well."


@pytest.mark.parametrize(
    ("found", "asked", "answers", "reward"),
    [
        ("flu", 0, [], 0),
        ("flu", 1, [FEVER], 1.2),
        ("flu", 2, [FED], 0.1),
        ("flu", 2, [FED, FED], 0.2),
        ("flu", 3, [FED, RESTED], 1 + 0.4 / 3),
        ("stress", 1, [FEVER], 0.2),
        (None, 2, [FEVER], 0.1),
        (None, 0, [], 0),
    ],
)
def test_what_a_visit_is_worth(
    found: str | None, asked: int, answers: list[str], reward: float
) -> None:
    assert worth(found, Patient("flu"), asked, answers) == pytest.approx(reward)


def test_two_denials_leave_the_third_illness() -> None:
    assert Patient("stress").is_clear_from([NO_FEVER, FED])
    assert not Patient("stress").is_clear_from([NO_FEVER])


def test_the_visits_are_those_of_the_generator() -> None:
    assert not set(OPENINGS["train"]) & set(OPENINGS["validation"])
    for split in OPENINGS:
        made = visits(split)
        assert lines(TUTORIAL / "example_learning_to_ask" / f"patients_{split}.jsonl") == made
        assert len(made) == 3 * len(OPENINGS[split])


# ---------------------------------------------------------------- feedback tracing


def test_the_log_is_that_of_the_generator() -> None:
    log = traces(random.Random("traces"))
    assert lines(TUTORIAL / "example_feedback_tracing" / "traces.jsonl") == log
    assert sum(entry["source"] == "monitor" for entry in log) == 20


def test_the_log_becomes_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(TUTORIAL / "example_feedback_tracing" / "feedback_tracing.yaml").config
    splits = read_tasks(config.task_reader, 0)
    assert (len(splits.train), len(splits.validation)) == (98, 42)
    assert all(len(task.metadata["liked"]) == 1 for task in splits.train + splits.validation)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [(" repair\n", (1.0, True)), ("delivery", (0.1, False)), ("account", (0.0, False))],
)
def test_the_judge_knows_what_users_said(reply: str, verdict: tuple[float, bool]) -> None:
    task = Task(main_query="q", metadata={"liked": ["repair"], "disliked": ["delivery"]})
    episode = WorkflowTask(task=task, task_id="0", episode_id="e", repeat_index=0, split="train")
    output = WorkflowOutput(metadata={"final_answer": reply})
    assert FeedbackJudge().compute_reward(episode, output) == verdict


# ---------------------------------------------------------------- rubric judge


def test_the_rubric_that_the_examples_lead_to(
    judge_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["make_rubric", "--base-url", judge_url, "--model", "scripted"])
    make_rubric.main()
    made = capsys.readouterr().out.strip()
    assert made.splitlines() == list(CRITERIA)
    config = load_config(TUTORIAL / "example_rubric_judge" / "rubric_judge.yaml").config
    assert config.task_judge.llm.rubric.strip() == made


def test_the_scripted_judge_scores_by_the_rubric() -> None:
    whole = "\n".join(CRITERIA)
    assert score(whole, "<answer>\nSorry, Ann! We send it today.\n</answer>") == 1.0
    assert score(whole, "<answer>\nSorry, is it wet?\n</answer>") == 0.5
    assert score(whole, "<answer>\n\n</answer>") == 0.0
    assert score("Be nice.", "<answer>\nSorry, Ann!\n</answer>") == 0.0


def test_the_scripted_judge_speaks_chat_completions(judge_url: str) -> None:
    async def ask() -> str | None:
        async with openai.AsyncOpenAI(base_url=judge_url, api_key="none") as client:
            reply = await client.chat.completions.create(
                model="scripted",
                messages=[
                    {"role": "system", "content": "The reply asks nothing."},
                    {"role": "user", "content": "<answer>\nFine.\n</answer>"},
                ],
            )
        return reply.choices[0].message.content

    assert asyncio.run(ask()) == '{"score": 1.0}'


def test_the_letters_are_those_of_the_generator() -> None:
    for split in COMPLAINTS:
        written = lines(TUTORIAL / "example_rubric_judge" / f"complaints_{split}.jsonl")
        assert written == letters(split)
