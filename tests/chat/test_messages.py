"""What clients send, brought into one form; and which differences matter."""

from __future__ import annotations

from typing import Any

import pytest

from astuner.chat import normalise
from astuner.chat.messages import comparable
from astuner.errors import RequestError


def one(message: dict[str, Any]) -> dict[str, Any]:
    return normalise([message])[0]


def call(arguments: Any, call_id: str = "c1", name: str = "add") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def test_text_in_all_its_shapes() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    assert one({"role": "user", "content": parts}) == {"role": "user", "content": "a\nb\nc"}
    assert one({"role": "assistant", "content": None}) == {"role": "assistant", "content": ""}
    assert one({"role": "assistant"})["content"] == ""
    refusal = [{"type": "refusal", "refusal": "no"}]
    assert one({"role": "assistant", "content": refusal})["content"] == "no"


def test_extras_are_dropped_and_the_rest_is_kept() -> None:
    message = {
        "role": "assistant",
        "content": "x",
        "name": "solver",
        "refusal": None,
        "audio": None,
        "function_call": None,
        "annotations": [],
        "tool_calls": None,
        "reasoning": "because",
    }
    assert one(message) == {
        "role": "assistant",
        "content": "x",
        "name": "solver",
        "reasoning_content": "because",
    }
    tool = {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "add"}
    assert one(tool) == tool


def test_arguments_become_text() -> None:
    for arguments, text in [
        ({"x": "é"}, '{"x": "é"}'),
        ('{"x":1}', '{"x":1}'),
        (None, "{}"),
        ("", "{}"),
    ]:
        assert one(call(arguments))["tool_calls"][0]["function"]["arguments"] == text
    # Half a surrogate pair stays escaped, so that it can be sent on as UTF-8.
    assert (
        one(call({"x": "\ud800"}))["tool_calls"][0]["function"]["arguments"] == '{"x": "\\ud800"}'
    )


def test_normalising_twice_changes_nothing() -> None:
    once = normalise([{"role": "user", "content": ["a", "b"]}, call({"x": [1]})])
    assert normalise(once) == once


@pytest.mark.parametrize(
    ("messages", "param", "says"),
    [
        ([], "messages", "must not be empty"),
        ("hi", "messages", "must be a list of messages, not str"),
        (["hi"], "messages[0]", "must be an object, not str"),
        (
            [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}],
            "messages[1].role",
            "is 'robot', but must be one of system, developer, user, assistant, tool",
        ),
        ([{"role": "user", "content": 5}], "messages[0].content", "must be text, not int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages[0].content[0]",
            "has type 'image_url', but the model reads text only",
        ),
        (
            [{"role": "user", "content": [{"type": "input_audio"}]}],
            "messages[0].content[0]",
            "the model reads text only",
        ),
        (
            [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}],
            "messages[0].content[0]",
            "has type ['text'], but the model reads text only",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages[0].content[0].text",
            "must be a string, not NoneType",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"id": "1", "type": "custom"}]}],
            "messages[0].tool_calls[0].function",
            "is missing",
        ),
        (
            [call("{}", name=None)],  # type: ignore[arg-type]
            "messages[0].tool_calls[0].function.name",
            "must be a string, not NoneType",
        ),
        ([{"role": "tool", "tool_call_id": 3}], "messages[0].tool_call_id", "must be a string"),
    ],
)
def test_what_cannot_be_asked(messages: Any, param: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        normalise(messages)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert str(caught.value).startswith(param) and says in str(caught.value)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return comparable(one(a)) == comparable(one(b))


def test_what_frameworks_do_to_a_resent_message_is_the_same_message() -> None:
    reply = {"role": "assistant", "content": "x"}
    assert same(reply, {**reply, "content": [{"type": "text", "text": "x"}]})
    assert same(reply, {**reply, "name": "solver", "refusal": None, "annotations": []})
    assert same(reply, {**reply, "reasoning_content": "because"})
    assert same(call('{"a":1,"b":[2]}'), call({"b": [2], "a": 1}))
    assert same(call("{}"), {**call("{}"), "content": ""})


def test_what_the_model_would_see_otherwise_is_another_message() -> None:
    reply = {"role": "assistant", "content": "x"}
    assert not same(reply, {**reply, "content": "x "})
    assert not same(reply, {**reply, "role": "user"})
    assert not same({"role": "user", "content": "x"}, {"role": "user", "content": "x", "name": "A"})
    assert not same(call('{"a":1}'), call('{"a":1.0}'))
    assert not same(call('{"a":1}'), call('{"a":true}'))
    assert not same(call('{"a":1}'), call('{"a":1}', call_id="c2"))
    assert not same(call('{"a":1}'), call('{"a":1}', name="sub"))
    assert not same(call("no json"), call('"no json"'))
    tool = {"role": "tool", "content": "1", "tool_call_id": "c1"}
    assert not same(tool, {**tool, "tool_call_id": "c2"})
