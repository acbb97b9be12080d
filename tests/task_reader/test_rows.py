"""One row to one Task, and every way a row can be wrong."""

from __future__ import annotations

from typing import Any

import pytest

from astuner.config.schema import FieldMapping
from astuner.errors import DataError
from astuner.task_reader.rows import task_from_row, tasks_from_rows
from astuner.types import Task

WHERE = "d.jsonl:3"


def task(row: Any, **fields: str) -> Task:
    return task_from_row(row, FieldMapping(**fields), WHERE, 7)


def refusal(row: Any, **fields: str) -> str:
    with pytest.raises(DataError) as caught:
        task(row, **fields)
    return str(caught.value)


def test_gsm8k_row() -> None:
    assert task({"question": "2 and 2?", "answer": "2+2=4\n#### 4"}) == Task(
        task_id="7", main_query="2 and 2?", metadata={"answer": "2+2=4\n#### 4"}
    )


def test_a_row_in_the_form_of_a_task() -> None:
    messages = [{"role": "system", "content": "Be brief."}]
    row = {
        "task_id": 12,
        "main_query": "q",
        "init_messages": messages,
        "env_type": "appworld",
        "metadata": {"answer": "a", "level": 1},
        "level": 2,
    }
    assert task(row) == Task(
        task_id="12",
        main_query="q",
        init_messages=messages,
        env_type="appworld",
        metadata={"answer": "a", "level": 2},
    )


@pytest.mark.parametrize(
    "name", ["main_query", "question", "query", "prompt", "problem", "instruction"]
)
def test_the_query_is_found_under_the_usual_names(name: str) -> None:
    found = task({name: "q", "x": 1})
    assert (found.main_query, found.metadata) == ("q", {"x": 1})


def test_a_main_query_wins_over_other_names() -> None:
    found = task({"prompt": "p", "question": "q"})
    assert (found.main_query, found.metadata) == ("q", {"prompt": "p"})


def test_a_mapping() -> None:
    found = task(
        {"frage": "q", "loesung": "4", "nr": "n1"},
        main_query="frage", answer="loesung", task_id="nr",
    )  # fmt: skip
    assert (found.task_id, found.main_query) == ("n1", "q")
    assert found.metadata == {"loesung": "4", "answer": "4"}


def test_a_prompt_of_messages() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    found = task({"prompt": messages, "answer": "a"})
    assert (found.main_query, found.init_messages) == ("q", messages)
    assert found.metadata == {"answer": "a"}
    found = task({"init_messages": messages})
    assert (found.main_query, found.init_messages) == ("q", messages)


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (3, {}, "a row must be an object, but is 3 (int)."),
        ({"text": "q", "label": 1}, {},
         "no field holds the query; looked for main_query, question, query, prompt, problem, "
         "instruction, found 'text', 'label'. Set astuner.task_reader.fields.main_query"),
        ({"question": "q"}, {"main_query": "frage"},
         "the field 'frage' is missing (the row has 'question'). "
         "Set astuner.task_reader.fields.main_query to the right field, or mend the row."),
        ({"frage": None}, {"main_query": "frage"}, "the field 'frage' is missing (it is null)."),
        ({"question": 3}, {}, "the field 'question' must be a text, but is 3 (int)."),
        ({"question": "q", "task_id": 1.5}, {},
         "the field 'task_id' must be a text or a whole number, but is 1.5 (float)."),
        ({"question": "q", "init_messages": "hi"}, {},
         "the field 'init_messages' must be a list of messages {role, content}, but is 'hi' (str)"),
        ({"question": "q", "init_messages": [{"content": "x"}]}, {},
         "must be a list of messages {role, content}, but is [{'content': 'x'}] (list)."),
        ({"question": "q", "env_type": 3}, {}, "the field 'env_type' must be a text, but is 3"),
        ({"question": "q", "metadata": [1]}, {}, "the field 'metadata' must be an object, but is"),
        ({"question": "q", "x": 1}, {"answer": "gold"},
         "the field 'gold' is missing (the row has 'x'). Set astuner.task_reader.fields.answer"),
    ],
)  # fmt: skip
def test_bad_rows(row: Any, fields: dict[str, str], message: str) -> None:
    told = refusal(row, **fields)
    assert told.startswith(f"{WHERE}: ")
    assert message in told


def test_duplicate_ids() -> None:
    rows = [("d:1", {"task_id": "a", "query": "x"}), ("d:2", {"task_id": "a", "query": "y"})]
    with pytest.raises(DataError) as caught:
        tasks_from_rows(rows, FieldMapping())
    assert str(caught.value) == (
        "d:2: the field 'task_id' is 'a', as in d:1; task ids must be unique. Mend the data, or "
        'set astuner.task_reader.fields.task_id to "" to number the rows.'
    )
    numbered = tasks_from_rows(rows, FieldMapping(task_id=""))
    assert [(t.task_id, t.metadata) for t in numbered] == [
        ("0", {"task_id": "a"}),
        ("1", {"task_id": "a"}),
    ]
