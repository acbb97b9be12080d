"""Logged conversations with their users' feedback, as tasks to do better on.

A line holds what was asked, what the agent answered and what its user thought of that.
Unrated and filtered lines are left out; conversations that count as the same become one
task whose feedback is added up, before anything is held out, so that validation holds no
twin of a training task. What a reply is worth later is the judge's business: it finds
`metadata["liked"]`, `["disliked"]` and `["feedback"]` (reply to sum).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from astuner.config.schema import TaskReaderConfig, TracesConfig
from astuner.errors import DataError, MissingDependency
from astuner.loading import load_object
from astuner.task_reader.jsonl import rows_of
from astuner.task_reader.reader import TaskSplits
from astuner.task_reader.rows import last_user_text, messages_of, shown
from astuner.types import Task

logger = logging.getLogger(__name__)

_KEY = "astuner.task_reader.traces"
_WORDS: Mapping[str, float] = {
    **dict.fromkeys(("up", "thumbs_up", "like", "liked", "good", "positive", "👍"), 1.0),
    **dict.fromkeys(("down", "thumbs_down", "dislike", "disliked", "bad", "negative", "👎"), -1.0),
}


@dataclass(frozen=True)
class Trace:
    """One logged reply."""

    messages: tuple[dict[str, Any], ...]
    """The conversation before the reply."""
    reply: str
    feedback: float | None
    """Above 0 is good, below is bad; None where nobody rated it."""
    record: Mapping[str, Any]
    """The whole line, for filters."""


Filter = Callable[[Trace], bool]
"""Whether a trace is kept."""


@dataclass
class _Question:
    """Traces that count as one conversation: the first one's messages, all of their replies."""

    messages: tuple[dict[str, Any], ...]
    feedback: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, trace: Trace) -> None:
        self.feedback[trace.reply] = self.feedback.get(trace.reply, 0.0) + (trace.feedback or 0.0)


def read(config: TaskReaderConfig, seed: int) -> TaskSplits:
    """Training tasks in the order of the log; the held-out share is taken from them later.

    Raises DataError for what cannot be read, LoadingError for a filter that is not there,
    MissingDependency where `near` lacks rapidfuzz.
    """
    settings = config.traces
    traces = _kept(list(_traces(settings)), settings)
    questions = _merged(traces, settings)
    logger.info("%d traces make %d different tasks", len(traces), len(questions))
    return TaskSplits([_task(str(index), q) for index, q in enumerate(questions)], [])


def _traces(settings: TracesConfig) -> Iterable[Trace]:
    if not settings.log_path:
        raise DataError(f"No log is set: give {_KEY}.log_path.")
    path = Path(settings.log_path).expanduser()
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .jsonl file. Set {_KEY}.log_path to the log.")
    for file in files:
        for where, row in rows_of(file):
            yield _trace(row, settings, where)


def _trace(row: Any, settings: TracesConfig, where: str) -> Trace:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a line must be an object, but is {shown(row)}.")
    record = cast("Mapping[str, Any]", row)
    messages = messages_of(_at(record, settings.messages, "messages", where), "messages", where)
    if settings.reply:
        reply = _at(record, settings.reply, "reply", where)
    elif messages and messages[-1]["role"] == "assistant":
        reply = messages.pop()
    else:
        raise DataError(
            f"{where}: the conversation does not end with the assistant's reply. "
            f"Set {_KEY}.reply to the field that holds it."
        )
    if isinstance(reply, Mapping):
        reply = cast("Mapping[str, Any]", reply).get("content")
    if not isinstance(reply, str):
        raise DataError(f"{where}: the reply must be a text or a message, but is {shown(reply)}.")
    feedback = _feedback(_at(record, settings.feedback, None, where), settings, where)
    return Trace(tuple(messages), reply.strip(), feedback, record)


def _at(record: Any, path: str, needed: str | None, where: str) -> Any:
    """What the dotted path leads to; numbers lead into lists. Absent is None, or, where it is
    needed, a DataError that names the key to set."""
    found = record
    for name in path.split("."):
        if isinstance(found, Mapping):
            found = cast("Mapping[str, Any]", found).get(name)
        elif isinstance(found, list) and name.isdecimal():
            listed = cast("list[Any]", found)
            found = listed[int(name)] if int(name) < len(listed) else None
        else:
            found = None
    if found is None and needed:
        raise DataError(
            f"{where}: there is nothing at {path!r}; the line has {', '.join(map(repr, record))}. "
            f"Set {_KEY}.{needed} to the right field."
        )
    return found


def _feedback(value: Any, settings: TracesConfig, where: str) -> float | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return 1.0 if value else -1.0
    if isinstance(value, int | float) and abs(value) < float("inf"):
        return float(value)
    word = value.strip().lower() if isinstance(value, str) else ""
    if word in _WORDS:
        return _WORDS[word]
    raise DataError(
        f"{where}: feedback must be a number, true or false, or one of {', '.join(_WORDS)}, "
        f"but {settings.feedback!r} is {shown(value)}. Translate it before, or set "
        f"{_KEY}.feedback to another field."
    )


def _kept(traces: list[Trace], settings: TracesConfig) -> list[Trace]:
    """What is rated (where that is required) and passes every filter."""
    kept = traces
    if settings.require_feedback:
        kept = [trace for trace in traces if trace.feedback is not None]
    logger.info("%d of %d traces are rated", len(kept), len(traces))
    for name in settings.filters:
        keep: Filter = load_object(name, "a filter of traces")
        before, kept = len(kept), [trace for trace in kept if keep(trace)]
        logger.info("%s kept %d of %d traces", name, len(kept), before)
    if traces and not kept:
        raise DataError(
            f"Nothing is left of {len(traces)} traces: {_KEY}.require_feedback is "
            f"{settings.require_feedback}, filters are {settings.filters}. Loosen one of them."
        )
    return kept


def _merged(traces: Sequence[Trace], settings: TracesConfig) -> list[_Question]:
    if settings.deduplicate == "none":
        questions = [_Question(trace.messages) for trace in traces]
        for question, trace in zip(questions, traces, strict=True):
            question.add(trace)
        return questions
    found: dict[str, _Question] = {}
    near = _nearest(settings.similarity) if settings.deduplicate == "near" else None
    for trace in traces:
        text = normal(trace.messages)
        if near and text not in found:
            text = near(text, list(found)) or text
        found.setdefault(text, _Question(trace.messages)).add(trace)
    return list(found.values())


def normal(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as plain lower-case words, for comparing."""
    lines = (f"{message['role']} {message.get('content') or ''}" for message in messages)
    return re.sub(r"[\W_]+", " ", "\n".join(lines).casefold()).strip()


def _nearest(similarity: float) -> Callable[[str, list[str]], str | None]:
    """Finds the most similar known text, if it is similar enough."""
    try:
        from rapidfuzz import fuzz, process
    except ModuleNotFoundError as error:
        raise MissingDependency("rapidfuzz", "traces", f"{_KEY}.deduplicate: near") from error

    def nearest(text: str, known: list[str]) -> str | None:
        best = process.extractOne(text, known, scorer=fuzz.ratio, score_cutoff=100 * similarity)
        return best[0] if best else None

    return nearest


def _task(task_id: str, question: _Question) -> Task:
    messages = [dict(message) for message in question.messages]
    feedback = question.feedback
    return Task(
        task_id=task_id,
        main_query=last_user_text(messages),
        init_messages=messages,
        metadata={
            "liked": [reply for reply, total in feedback.items() if total > 0],
            "disliked": [reply for reply, total in feedback.items() if total < 0],
            "feedback": dict(feedback),
        },
    )
