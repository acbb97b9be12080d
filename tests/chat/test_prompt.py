"""From a resent conversation to the next prompt, turn by turn, with literal ids."""

from __future__ import annotations

from typing import Any

from astuner.chat import ChatCodec, History, Prompt, build_prompt, normalise, reply_message
from astuner.types import TokenIds

from .conversations import TOOLS
from .families import codec


class Client:
    """Keeps the conversation as an OpenAI client does, and answers with a given text."""

    def __init__(self, chat: ChatCodec, tools: list[dict[str, Any]] | None = None) -> None:
        self.chat, self.tools = chat, tools or []
        self.history = History()
        self.messages: list[dict[str, Any]] = []
        self.calls = 0

    def ask(self, *messages: dict[str, Any], answer: str) -> tuple[Prompt, TokenIds]:
        self.messages += messages
        sent = normalise(self.messages)
        prompt = build_prompt(self.chat, self.history, sent, self.tools)
        completion = self.chat.encode(answer)
        reply = reply_message(self.chat.parse(completion, prompt.ids, self.tools))
        self.history.add(sent, self.tools, reply, prompt.ids, completion, f"c{self.calls}")
        self.calls += 1
        reply.pop("reasoning_content", None)  # as most clients do
        self.messages.append({**reply, "refusal": None, "content": reply["content"] or None})
        return prompt, completion


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_a_conversation_is_one_timeline() -> None:
    client = Client(codec("smollm2"))
    first, said = client.ask(user("hi"), answer="Fine.<|im_end|>")
    assert (first.parent_id, first.new_timeline_reason) == (None, "first")
    second, again = client.ask(user("sure?"), answer="Yes")
    assert (second.parent_id, second.new_timeline_reason) == ("c0", None)
    delta = client.chat.encode("\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n")
    assert second.ids.tolist() == [*first.ids.tolist(), *said.tolist(), *delta.tolist()]
    third, _ = client.ask(user("why?"), answer="So.<|im_end|>")
    assert third.parent_id == "c1"
    known = [*second.ids.tolist(), *again.tolist(), client.chat.stop_token_ids[0]]
    assert third.ids[: len(known)].tolist() == known


def test_an_edited_reply_starts_anew() -> None:
    client = Client(codec("smollm2"))
    client.ask(user("hi"), answer="Fine.<|im_end|>")
    client.messages[1]["content"] = "Well."
    prompt, _ = client.ask(user("sure?"), answer="Yes<|im_end|>")
    assert (prompt.parent_id, prompt.new_timeline_reason) == (None, "edited_history")
    assert "Well." in client.chat.decode(prompt.ids) and "Fine." not in client.chat.decode(
        prompt.ids
    )


def test_a_rewriting_template_starts_anew_only_where_it_rewrites() -> None:
    for name in ("qwen3", "qwen3-bridge"):
        client = Client(codec(name), TOOLS)
        call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>'
        first, said = client.ask(user("hi"), answer=f"<think>\nHm.\n</think>\n\n{call}")
        result = {
            "role": "tool",
            "content": "3",
            "tool_call_id": client.messages[-1]["tool_calls"][0]["id"],
        }
        second, _ = client.ask(result, answer="<think>\nSo.\n</think>\n\nThree.<|im_end|>")
        assert second.parent_id == "c0"
        # The client dropped the reasoning; the tokens still have it.
        assert "Hm." in client.chat.decode(second.ids)
        assert second.ids[: len(first.ids) + len(said)].tolist() == [*first.ids, *said]
        third, _ = client.ask(user("sure?"), answer="Yes.<|im_end|>")
        assert (third.parent_id, third.new_timeline_reason) == (None, "template_rewrites")
        assert "Hm." not in client.chat.decode(third.ids)


def test_other_tools_and_a_trailing_assistant_message() -> None:
    client = Client(codec("qwen2.5"), TOOLS)
    client.ask(user("hi"), answer="Fine.<|im_end|>")
    client.tools = TOOLS[:1]
    prompt, _ = client.ask(user("sure?"), answer="Yes<|im_end|>")
    assert prompt.new_timeline_reason == "tools_changed"
    prompt, _ = client.ask(answer="More<|im_end|>")
    assert prompt.new_timeline_reason == "continues_assistant"


def test_a_retry_gets_the_same_prompt() -> None:
    client = Client(codec("smollm2"))
    client.ask(user("hi"), answer="Fine.<|im_end|>")
    one, _ = client.ask(user("sure?"), answer="Yes<|im_end|>")
    client.messages = client.messages[:2]
    two, _ = client.ask(user("sure?"), answer="No<|im_end|>")
    assert one.ids.tolist() == two.ids.tolist() and one.parent_id == two.parent_id == "c0"
