"""Logged conversations become tasks: what is left out, what counts as one, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from astuner.config.schema import TaskReaderConfig
from astuner.errors import DataError, LoadingError, MissingDependency
from astuner.task_reader.reader import TaskSplits, read_tasks
from astuner.task_reader.traces import Trace


def line(question: str, reply: str, feedback: Any = "up", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "feedback": feedback, **more}


def read(tmp_path: Path, rows: list[Any], fraction: float = 0.0, **settings: Any) -> TaskSplits:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TaskReaderConfig(type="traces", validation_fraction=fraction)
    config.traces.log_path = str(log)
    for name, value in settings.items():
        setattr(config.traces, name, value)
    return read_tasks(config, 0)


def refusal(tmp_path: Path, rows: list[Any], **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, rows, **settings)
    return str(caught.value)


def test_a_trace_becomes_a_task(tmp_path: Path) -> None:
    (task,) = read(tmp_path, [line("Where is my parcel?", " delivery ")]).train
    assert task.main_query == "Where is my parcel?"
    assert task.init_messages == [{"role": "user", "content": "Where is my parcel?"}]
    assert task.metadata == {"liked": ["delivery"], "disliked": [], "feedback": {"delivery": 1.0}}


def test_feedback_on_the_same_conversation_is_added_up(tmp_path: Path) -> None:
    rows = [
        line("Where is my parcel?", "delivery", "up"),
        line("where is my  parcel", "billing", "down"),
        line("Where is my parcel?!", "delivery", 2),
        line("Where is my parcel?", "account", True),
        line("Where is my parcel?", "account", False),
    ]
    (task,) = read(tmp_path, rows).train
    assert task.metadata["feedback"] == {"delivery": 3.0, "billing": -1.0, "account": 0.0}
    assert task.metadata["liked"] == ["delivery"]
    assert task.metadata["disliked"] == ["billing"]
    assert len(read(tmp_path, rows, deduplicate="none").train) == 5


def test_near_twins_are_one_from_the_given_similarity_on(tmp_path: Path) -> None:
    pytest.importorskip("rapidfuzz")
    rows = [line("My parcel number 17 is late", "a"), line("My parcel number 18 is late", "b")]
    assert len(read(tmp_path, rows).train) == 2
    (task,) = read(tmp_path, rows, deduplicate="near", similarity=0.9).train
    assert task.metadata["feedback"] == {"a": 1.0, "b": 1.0}
    assert len(read(tmp_path, rows, deduplicate="near", similarity=0.99).train) == 2


def test_twins_are_merged_before_anything_is_held_out(tmp_path: Path) -> None:
    rows = [line(f"Question {n % 10}", "yes") for n in range(40)]
    splits = read(tmp_path, rows, fraction=0.3)
    train, held_out = ({t.main_query for t in part} for part in (splits.train, splits.validation))
    assert (len(splits.train), len(splits.validation)) == (7, 3)
    assert train.isdisjoint(held_out)


def not_a_ping(trace: Trace) -> bool:
    return trace.record.get("source") != "monitor" and trace.reply != "pong"


def test_the_unrated_and_the_filtered_are_left_out(tmp_path: Path) -> None:
    rows = [
        line("a", "x", None),
        line("b", "x", ""),
        line("c", "x", source="monitor"),
        line("d", "pong"),
        line("e", "x"),
    ]
    filters = [f"{__name__}->not_a_ping"]
    kept = read(tmp_path, rows, filters=filters).train
    assert [task.main_query for task in kept] == ["e"]
    every = read(tmp_path, rows, filters=filters, require_feedback=False).train
    assert [task.main_query for task in every] == ["a", "b", "e"]
    assert every[0].metadata == {"liked": [], "disliked": [], "feedback": {"x": 0.0}}
    assert "Nothing is left of 2 traces" in refusal(tmp_path, rows[:2])
    with pytest.raises(LoadingError, match="a filter of traces"):
        read(tmp_path, rows, filters=[f"{__name__}->not_there"])


def test_fields_of_other_logs(tmp_path: Path) -> None:
    row = {
        "request": {"messages": [{"role": "user", "content": "Hi"}]},
        "response": {"choices": [{"message": {"role": "assistant", "content": "Hello"}}]},
        "scores": {"user": 0},
    }
    fields = {
        "messages": "request.messages",
        "reply": "response.choices.0.message",
        "feedback": "scores.user",
    }
    (task,) = read(tmp_path, [row], **fields).train
    assert task.metadata["feedback"] == {"Hello": 0.0}


def test_a_folder_of_logs(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line(name, "x")) + "\n")
    config = TaskReaderConfig(type="traces", validation_fraction=0)
    config.traces.log_path = str(tmp_path)
    assert [task.main_query for task in read_tasks(config, 0).train] == ["a", "b"]


def test_refusals_name_line_and_key(tmp_path: Path) -> None:
    assert "give astuner.task_reader.traces.log_path" in refusal(tmp_path, [], log_path="")
    assert "There is no dataset file" in refusal(tmp_path, [], log_path=str(tmp_path / "no.jsonl"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no .jsonl file" in refusal(tmp_path, [], log_path=str(empty))
    good = line("q", "a")
    assert "log.jsonl:2: a line must be an object" in refusal(tmp_path, [good, [1]])
    told = refusal(tmp_path, [good, {"chat": []}])
    assert "log.jsonl:2: there is nothing at 'messages'; the line has 'chat'" in told
    told = refusal(tmp_path, [{"messages": good["messages"][:1]}])
    assert "does not end with the assistant's reply" in told
    assert "Set astuner.task_reader.traces.reply" in told
    told = refusal(tmp_path, [line("q", "a", "meh")])
    assert "log.jsonl:1: feedback must be a number" in told
    assert "'meh' (str)" in told
    assert "nothing at 'answer.text'" in refusal(tmp_path, [good], reply="answer.text")
    told = refusal(tmp_path, [{**good, "answer": 3}], reply="answer")
    assert "the reply must be a text or a message, but is 3 (int)" in told


def test_near_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(MissingDependency, match=r'pip install "astuner\[traces\]"'):
        read(tmp_path, [line("q", "a")], deduplicate="near")
