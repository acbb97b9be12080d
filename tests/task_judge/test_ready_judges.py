"""The ready judges on real-looking answers, and what they say of tasks they cannot judge."""

from __future__ import annotations

import sys
import threading
from decimal import Decimal

import pytest

from astuner.config.schema import RegexJudgeConfig, TaskJudgeConfig
from astuner.errors import DataError, EngineError, MissingDependency, UserCodeError
from astuner.task_judge import Verdict, make_judge, score
from astuner.task_judge.answers import boxed, last_number, lone_number
from astuner.task_judge.maths import Comparer, MathVerify
from astuner.types import Task, WorkflowOutput, WorkflowTask

WRONG = 0.125
"""wrong_reward in these tests."""


async def judged(
    kind: str, reference: object, answer: object, *, key: str = "final_answer", **more: object
) -> Verdict:
    config = TaskJudgeConfig(judge_type=kind, wrong_reward=WRONG, **more)  # type: ignore[arg-type]
    judge = make_judge(config)
    assert judge is not None
    metadata = {} if reference is None else {"answer": reference}
    task = WorkflowTask(task=Task(task_id="t1", metadata=metadata))
    return await score(judge, task, WorkflowOutput(metadata={key: answer}))


def reward(verdict: Verdict) -> float:
    assert verdict.is_success is (verdict.reward == 1.0)
    return verdict.reward


# ---------------------------------------------------------------- exact and number


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("4", "4", 1.0),
        ("4", " 4\n", 1.0),
        (4, "4", 1.0),
        ("2+2=4\n#### 4", "4", 1.0),
        ("4", "5", WRONG),
        ("4", "4.", 0.0),
        ("4", "The answer is 4", 0.0),
        ("4", "", 0.0),
        ("4", None, 0.0),
        ("Paris", "Rome", WRONG),
        ("Paris", "paris", WRONG),
        ("Paris", "", 0.0),
    ],
)
async def test_exact_match(reference: object, answer: object, expected: float) -> None:
    assert reward(await judged("exact_match", reference, answer)) == expected


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("1000", "1,000", 1.0),
        ("1,000", "1000", 1.0),
        ("He has 3 left.\n#### 1,234,567", "So it is 1234567.", 1.0),
        ("72", "48 + 24 = 72", 1.0),
        ("72", "#### 72\nI checked it 3 times.", 1.0),
        ("72", "48 and 24 is #### 72 (checked 3 times)", 1.0),
        ("72", "so \\boxed{72}, as in step 2", 1.0),
        ("5", "$5", 1.0),
        ("5", "It costs $5.00.", 1.0),
        ("-5", "\u22125", 1.0),
        ("-5", "-$5", 1.0),
        ("50", "50%", 1.0),
        ("0.5", "50 %", 1.0),
        ("50%", "0.5", 1.0),
        ("50%", "0.5%", WRONG),
        ("0.5", ".5", 1.0),
        ("0.5", "1/2", 1.0),
        ("0.333333", "1/3", 1.0),
        ("0.33", "1/3", WRONG),
        ("1200", "1.2e3", 1.0),
        ("3", "3 apples", 1.0),
        ("3", "x3", 1.0),
        ("12345678901234567890", "12345678901234567891", WRONG),
        ("0", "0.000001", WRONG),
        ("72", "71", WRONG),
        ("72", "seventy-two", 0.0),
        ("72", "", 0.0),
        ("72", "72/0", 0.0),
        (8, "10-2 = 8", 1.0),
        (3, "2, 3", 1.0),
    ],
)
async def test_number_match(reference: object, answer: str, expected: float) -> None:
    assert reward(await judged("number_match", reference, answer)) == expected


def test_numbers() -> None:
    assert last_number("1,000,000.5 then 7") == (Decimal(7), False)
    assert last_number("1,000,000.5") == (Decimal("1000000.5"), False)
    assert last_number("12,34") == (Decimal(34), False)
    assert last_number("3-1") == (Decimal(1), False)
    assert last_number("a -1") == (Decimal(-1), False)
    assert last_number("20\\%") == (Decimal(20), True)
    assert last_number("none") is None
    assert lone_number("$1,000") == Decimal(1000)
    assert lone_number("1 2") is None
    assert boxed("\\boxed{1} and \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"


async def test_number_match_needs_a_number() -> None:
    with pytest.raises(DataError, match="of the task 't1' holds no number: 'Paris'"):
        await judged("number_match", "Paris", "4")


@pytest.mark.parametrize("kind", ["exact_match", "number_match", "math_verify"])
async def test_a_task_without_a_reference(kind: str) -> None:
    with pytest.raises(DataError) as caught:
        await judged(kind, None, "4")
    assert "The task 't1' has no reference answer: its metadata has [], not 'answer'." in str(
        caught.value
    )
    assert "Set astuner.task_reader.fields.answer or astuner.task_judge.answer_key" in str(
        caught.value
    )


async def test_the_last_reply_is_judged_where_the_workflow_gave_no_answer() -> None:
    assert reward(await judged("exact_match", "4", "4", key="last_reply")) == 1.0
    with pytest.raises(UserCodeError) as caught:
        await judged("exact_match", "4", "4", key="other")
    assert str(caught.value).startswith(
        "There is nothing to judge: the workflow returned no metadata['final_answer'] "
        "(only ['other']) and made no LLM call."
    )


async def test_other_keys() -> None:
    config = TaskJudgeConfig(judge_type="exact_match", answer_key="gold", output_key="said")
    judge = make_judge(config)
    assert judge is not None
    task = WorkflowTask(task=Task(metadata={"gold": "a"}))
    output = WorkflowOutput(metadata={"said": "a", "last_reply": "b"})
    assert await score(judge, task, output) == Verdict(1.0, None, True)


# ---------------------------------------------------------------- regex


@pytest.mark.parametrize(
    ("pattern", "answer", "expected"),
    [
        ("^{answer}$", "a.b", 1.0),
        ("^{answer}$", "axb", WRONG),
        ("(?i)^YES", "yes it is", 1.0),
        (r"\d{2}", "x 12", 1.0),
        (r"\d{2}", "x 1", WRONG),
        (r"\d{2}", "", 0.0),
    ],
)
async def test_regex(pattern: str, answer: str, expected: float) -> None:
    found = await judged("regex", "a.b", answer, regex=RegexJudgeConfig(pattern))
    assert reward(found) == expected


async def test_a_pattern_without_the_answer_needs_no_reference() -> None:
    assert reward(await judged("regex", None, "ok", regex=RegexJudgeConfig("ok"))) == 1.0


# ---------------------------------------------------------------- math-verify


@pytest.fixture(scope="module")
def maths() -> MathVerify:
    pytest.importorskip("math_verify")
    return MathVerify(TaskJudgeConfig(wrong_reward=WRONG))


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("\\frac{1}{2}", "0.5", 1.0),
        ("1,000", "1000", 1.0),
        ("... so\n#### 42", "The answer is 42.", 1.0),
        ("\\frac{1}{2}", "Therefore \\boxed{\\frac{2}{4}}.", 1.0),
        ("x+1", "1+x", 1.0),
        ("x+1", "1", WRONG),
        ("\\sqrt{2}", "$\\sqrt 2$", 1.0),
        ("(1,2)", "(1, 2)", 1.0),
        ("1000", "1e3", 1.0),
        ("\\frac{1}{2}", "0.6", WRONG),
        ("5", "no idea", 0.0),
        ("5", "", 0.0),
        ("Paris", "Paris", 1.0),
    ],
)
def test_math_verify(maths: MathVerify, reference: str, answer: str, expected: float) -> None:
    task = WorkflowTask(task=Task(metadata={"answer": reference}))
    found = maths.compute_reward(task, WorkflowOutput(metadata={"final_answer": answer}))
    assert found == (expected, expected == 1.0)


async def test_math_verify_off_the_main_thread() -> None:
    pytest.importorskip("math_verify")
    assert reward(await judged("math_verify", "\\frac{1}{2}", "$\\frac{2}{4}$")) == 1.0


def test_an_endless_comparison_is_ended_and_the_next_one_works() -> None:
    pytest.importorskip("math_verify")
    comparer = Comparer(seconds=1.0)
    assert comparer.compare("5", "9^{9^{9^{9}}}") == {"parsed": False, "same": False}
    comparer = Comparer(seconds=30.0)
    assert comparer.compare("x+1", "1+x") == {"parsed": True, "same": True}


def test_a_comparer_whose_process_was_killed_starts_another() -> None:
    pytest.importorskip("math_verify")
    comparer = Comparer(seconds=30.0)
    assert comparer.compare("5", "five")["same"] is False
    assert comparer._child is not None
    comparer._child.kill()
    comparer._child.wait(30)
    assert comparer.compare("5", "5")["same"] is True


def test_a_comparer_whose_process_dies_at_work_is_no_verdict_on_the_answer() -> None:
    pytest.importorskip("math_verify")
    comparer = Comparer(seconds=30.0)
    assert comparer.compare("5", "5")["same"] is True
    assert comparer._child is not None
    threading.Timer(0.5, comparer._child.kill).start()
    with pytest.raises(EngineError, match="ended on its own"):
        comparer.compare("5", "9^{9^{9^{9}}}")


# ---------------------------------------------------------------- reasoning-gym


async def test_reasoning_gym() -> None:
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("chain_sum", size=1, seed=1)[0]
    made = {"dataset": "chain_sum", "params": {}, "entry": entry}
    judge = make_judge(TaskJudgeConfig(judge_type="reasoning_gym", wrong_reward=WRONG))
    assert judge is not None
    task = WorkflowTask(task=Task(metadata={"reasoning_gym": made}))
    right = entry["answer"]
    for answer, expected in [
        (right, 1.0),
        (f"so <answer> {right} </answer> it is", 1.0),
        (f"thus #### {right}", 1.0),
        ("nothing of the kind", WRONG),
        (f"{right} or one of the others", len(right) / len(f"{right} or one of the others")),
        ("", 0.0),
    ]:
        found = await score(judge, task, WorkflowOutput(metadata={"final_answer": answer}))
        assert found == Verdict(max(expected, WRONG if answer else 0.0), None, expected == 1.0)


async def test_reasoning_gym_needs_its_own_tasks() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match="does not come from the reasoning_gym task reader"):
        await judged("reasoning_gym", "4", "4")


def test_missing_packages(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingDependency, match=r'pip install "astuner\[reasoning-gym\]"'):
        make_judge(TaskJudgeConfig(judge_type="reasoning_gym"))
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r'pip install "astuner\[math\]"'):
        make_judge(TaskJudgeConfig(judge_type="math_verify"))
