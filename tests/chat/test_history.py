"""Which recorded call a request continues, and why it continues none."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from astuner.chat import History, Match, normalise
from astuner.types import TokenIds, token_ids

USER = {"role": "user", "content": "1+1?"}
REPLY = {"role": "assistant", "content": "2"}
MORE = {"role": "user", "content": "sure?"}
TOOL = {"type": "function", "function": {"name": "add"}}


def ids(*values: int) -> TokenIds:
    return token_ids(values)


def add(
    history: History,
    messages: list[dict[str, Any]],
    reply: dict[str, Any],
    prompt: TokenIds,
    completion: TokenIds,
    call_id: str,
    tools: tuple[dict[str, Any], ...] = (),
) -> None:
    history.add(normalise(messages), tools, normalise([reply])[0], prompt, completion, call_id)


def match(history: History, *messages: dict[str, Any], tools: tuple[Any, ...] = ()) -> Match | None:
    return history.match(normalise(list(messages)), tools)


def why(history: History, *messages: dict[str, Any], tools: tuple[Any, ...] = ()) -> str:
    return history.why_new(normalise(list(messages)), tools)


@pytest.fixture
def one_call() -> History:
    history = History()
    add(history, [USER], REPLY, ids(1, 2), ids(3), "c0")
    return history


def test_a_request_continues_the_call_it_repeats(one_call: History) -> None:
    found = match(one_call, USER, REPLY, MORE)
    assert found is not None
    assert (found.call_id, found.prompt_ids.tolist(), found.completion_ids.tolist()) == (
        "c0",
        [1, 2],
        [3],
    )
    assert found.history == (USER, REPLY)
    assert found.new_messages == (MORE,)


def test_the_longest_repeated_call_wins(one_call: History) -> None:
    add(one_call, [USER, REPLY, MORE], {**REPLY, "content": "yes"}, ids(1, 2, 3, 4), ids(5), "c1")
    found = match(one_call, USER, REPLY, MORE, {**REPLY, "content": "yes"}, MORE)
    assert found is not None and found.call_id == "c1" and found.new_messages == (MORE,)
    assert [m["content"] for m in found.history] == ["1+1?", "2", "sure?", "yes"]
    earlier = match(one_call, USER, REPLY, {**MORE, "content": "why?"})
    assert earlier is not None and earlier.call_id == "c0"


def test_of_equal_calls_the_latest_is_taken(one_call: History) -> None:
    add(one_call, [USER], REPLY, ids(1, 2), ids(3), "c1")
    found = match(one_call, USER, REPLY, MORE)
    assert found is not None and found.call_id == "c1"


def test_nothing_is_continued_that_was_not_sampled_there(one_call: History) -> None:
    assert match(one_call, USER) is None
    assert match(one_call, USER, REPLY) is None
    assert match(one_call, {**USER, "content": "1+2?"}, REPLY, MORE) is None
    assert match(one_call, USER, {**REPLY, "content": "3"}, MORE) is None
    assert match(one_call, USER, REPLY, MORE, REPLY, MORE) is None
    assert match(one_call, USER, REPLY, MORE, tools=(TOOL,)) is None


def test_reasoning_may_be_left_out_but_not_changed() -> None:
    history = History()
    add(history, [USER], {**REPLY, "reasoning_content": "A"}, ids(1), ids(2), "c0")
    add(history, [USER], {**REPLY, "reasoning_content": "B"}, ids(1), ids(3), "c1")

    def resent(**extra: str) -> str | None:
        found = match(history, USER, {**REPLY, **extra}, MORE)
        return None if found is None else f"{found.call_id}{found.history[1]['reasoning_content']}"

    assert resent() == "c1B"
    assert resent(reasoning_content="A") == "c0A"
    assert resent(reasoning_content="B") == "c1B"
    assert resent(reasoning_content="C") is None
    # Also further back, where the client has long dropped it.
    add(history, [USER, REPLY, MORE], REPLY, ids(1, 3, 4), ids(5), "c2")
    later = match(history, USER, REPLY, MORE, REPLY, MORE)
    assert later is not None and later.history[1]["reasoning_content"] == "B"
    odd = {**REPLY, "reasoning_content": "C"}
    assert match(history, USER, odd, MORE, REPLY, MORE) is None


def test_a_call_rendered_anew_keeps_the_history_it_was_rendered_from() -> None:
    history = History()
    add(history, [USER], {**REPLY, "reasoning_content": "A"}, ids(1), ids(2), "c0")
    # Its prompt does not start with c0's tokens: the reasoning was not in it.
    add(history, [USER, REPLY, MORE], REPLY, ids(7, 8), ids(9), "c1")
    found = match(history, USER, REPLY, MORE, REPLY, MORE)
    assert found is not None and found.call_id == "c1"
    assert "reasoning_content" not in found.history[1]


def test_why_a_timeline_is_new(one_call: History) -> None:
    other = {**USER, "content": "Something else."}
    assert why(History(), USER) == "first"
    assert why(one_call, USER) == "first"
    assert why(one_call, other) == "first"
    assert why(one_call, other, {**REPLY, "content": "few-shot"}, other) == "first"
    assert why(one_call, USER, {**REPLY, "content": "two"}, MORE) == "edited_history"
    assert why(one_call, other, REPLY, MORE) == "edited_history"
    assert why(one_call, REPLY, MORE) == "edited_history"
    assert why(one_call, USER, REPLY, MORE, REPLY, MORE) == "edited_history"
    assert why(one_call, USER, REPLY, MORE, tools=(TOOL,)) == "tools_changed"
    assert why(one_call, USER, REPLY) == "continues_assistant"


def test_tools_that_change_back(one_call: History) -> None:
    add(one_call, [USER, REPLY, MORE], REPLY, ids(4), ids(5), "c1", tools=(TOOL,))
    assert match(one_call, USER, REPLY, MORE, REPLY, MORE) is None
    assert why(one_call, USER, REPLY, MORE, REPLY, MORE) == "tools_changed"
    found = match(one_call, USER, REPLY, MORE, REPLY, MORE, tools=(TOOL,))
    assert found is not None and found.call_id == "c1"


def test_many_threads_may_add_and_match() -> None:
    history = History()

    def converse(n: int) -> None:
        messages = [{"role": "user", "content": f"question {n}"}]
        prompt = ids(n)
        for turn in range(20):
            add(history, messages, REPLY, prompt, ids(100 + turn), f"{n}.{turn}")
            messages = [*messages, REPLY, MORE]
            found = match(history, *messages)
            assert found is not None and found.call_id == f"{n}.{turn}"
            prompt = token_ids([*prompt.tolist(), 100 + turn, 7])

    failures: list[BaseException] = []

    def run(n: int) -> None:
        try:
            converse(n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures and not any(t.is_alive() for t in threads)
