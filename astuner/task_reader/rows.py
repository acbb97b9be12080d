"""One row of a dataset to one Task, by the field mapping of the configuration.

Each complaint names where the row is, which field, and what was found there. It
reads no files and knows no dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from astuner.config.schema import FieldMapping
from astuner.errors import DataError
from astuner.types import Task

QUERY_NAMES = ("main_query", "question", "query", "prompt", "problem", "instruction")
"""Tried in this order where `task_reader.fields.main_query` is empty."""
_FIELDS = "astuner.task_reader.fields"


def tasks_from_rows(rows: Iterable[tuple[str, Any]], fields: FieldMapping) -> list[Task]:
    """Tasks from (where, row) pairs, `where` being "train.jsonl:12" or the like.

    Raises DataError for a bad row and for a task id that comes twice.
    """
    tasks: list[Task] = []
    seen: dict[str, str] = {}
    for index, (where, row) in enumerate(rows):
        task = task_from_row(row, fields, where, index)
        if task.task_id in seen:
            raise DataError(
                f"{where}: the field {fields.task_id!r} is {task.task_id!r}, as in "
                f"{seen[task.task_id]}; task ids must be unique. Mend the data, or set "
                f'{_FIELDS}.task_id to "" to number the rows.'
            )
        seen[task.task_id] = where
        tasks.append(task)
    return tasks


def task_from_row(row: Any, fields: FieldMapping, where: str, index: int) -> Task:
    """One Task. Fields without a meaning of their own go to `metadata`, and so does what
    is in the row's own "metadata". Raises DataError."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row must be an object, but is {shown(row)}.")
    rest = dict(cast("Mapping[str, Any]", row))
    task_id = _task_id(rest.pop(fields.task_id, None), fields, where, index)
    messages = messages_of(rest.pop(fields.init_messages, None), fields.init_messages, where)
    query, messages = _query(rest, messages, fields, where)
    env_type = rest.pop(fields.env_type, None)
    metadata = rest.pop("metadata", None)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise DataError(
            f"{where}: the field 'metadata' must be an object, but is {shown(metadata)}."
        )
    metadata = {**cast("Mapping[str, Any]", metadata or {}), **rest}
    if fields.answer:
        metadata["answer"] = _required(metadata, fields.answer, "answer", where)
    return Task(
        task_id=task_id,
        main_query=query,
        init_messages=messages,
        env_type=_text(env_type, fields.env_type, where) if env_type is not None else "",
        metadata=metadata,
    )


def _task_id(value: Any, fields: FieldMapping, where: str, index: int) -> str:
    if value is None:
        return str(index)
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return str(value)
    raise DataError(
        f"{where}: the field {fields.task_id!r} must be a text or a whole number, "
        f"but is {shown(value)}."
    )


def _query(
    rest: dict[str, Any], messages: list[dict[str, Any]], fields: FieldMapping, where: str
) -> tuple[str, list[dict[str, Any]]]:
    """Takes the query out of `rest`. Where it is a list of messages (as in many RL
    datasets), they become the opening and the last user message the query."""
    name = fields.main_query or next((n for n in QUERY_NAMES if rest.get(n) is not None), None)
    if name is None and messages:
        return last_user_text(messages), messages
    if name is None:
        raise DataError(
            f"{where}: no field holds the query; looked for {', '.join(QUERY_NAMES)}, found "
            f"{_names(rest)}. Set {_FIELDS}.main_query to the right one."
        )
    value = _required(rest, name, "main_query", where)
    del rest[name]
    if isinstance(value, list) and not messages:
        messages = messages_of(value, name, where)
        return last_user_text(messages), messages
    return _text(value, name, where), messages


def _required(row: Mapping[str, Any], name: str, meaning: str, where: str) -> Any:
    if row.get(name) is None:
        found = "it is null" if name in row else f"the row has {_names(row)}"
        raise DataError(
            f"{where}: the field {name!r} is missing ({found}). "
            f"Set {_FIELDS}.{meaning} to the right field, or mend the row."
        )
    return row[name]


def messages_of(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """A copy of the messages in the field `name`; none where it is missing. Raises DataError."""
    if value is None:
        return []
    good = isinstance(value, list) and all(
        isinstance(m, Mapping) and isinstance(cast("Mapping[str, Any]", m).get("role"), str)
        for m in cast("list[Any]", value)
    )
    if not good:
        raise DataError(
            f"{where}: the field {name!r} must be a list of messages "
            f"{{role, content}}, but is {shown(value)}."
        )
    return [dict(message) for message in cast("list[Mapping[str, Any]]", value)]


def last_user_text(messages: list[dict[str, Any]]) -> str:
    """What the user said last; "" where that is no text."""
    texts = [m.get("content") for m in messages if m.get("role") == "user"]
    return texts[-1] if texts and isinstance(texts[-1], str) else ""


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, str):
        return value
    raise DataError(f"{where}: the field {name!r} must be a text, but is {shown(value)}.")


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no fields"


def shown(value: Any) -> str:
    """A value and its type, short enough for a message."""
    text = repr(value)
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({type(value).__name__})"
