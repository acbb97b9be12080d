"""A local endpoint that stands in for a judging model, so that the tutorial needs none.

`python -m tutorial.example_rubric_judge.scripted_judge` serves it on loopback. It speaks
Chat Completions and knows four criteria by rule: where the system message is a rubric, the
score is the share of its known criteria that the answer meets; where a rubric is asked for,
it writes those that the examples with full score meet and one with none does not. It
understands nothing else: for anything real put a model's endpoint in its place.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tutorial.example_rubric_judge.make_rubric import ASK

CRITERIA: Mapping[str, Callable[[str], bool]] = {
    'The reply says "sorry".': lambda reply: "sorry" in reply.lower(),
    "The reply addresses the customer by name.": lambda reply: bool(
        re.search(r"\b(Ann|Ben|Cleo|Dan|Eva)\b", reply)
    ),
    "The reply has at most 8 words.": lambda reply: 0 < len(reply.split()) <= 8,
    "The reply asks nothing.": lambda reply: bool(reply) and "?" not in reply,
}


def answered(messages: Sequence[Mapping[str, str]]) -> str:
    """What the stand-in says to these messages."""
    system, shown = messages[0]["content"], messages[-1]["content"]
    return rubric(shown) if system == ASK else json.dumps({"score": score(system, shown)})


def score(rubric: str, shown: str) -> float:
    """The share of the rubric's known criteria that the text in <answer> meets."""
    found = re.search(r"<answer>\n(.*)\n</answer>", shown, re.DOTALL)
    answer = found[1].strip() if found else ""
    asked = [check for criterion, check in CRITERIA.items() if criterion in rubric]
    return sum(check(answer) for check in asked) / len(asked) if asked else 0.0


def rubric(shown: str) -> str:
    """The criteria that all examples with full score meet, and some with none does not."""
    examples = re.findall(r"^Reply: (.*)\nScore: (.*)$", shown, re.MULTILINE)
    good = [reply for reply, mark in examples if float(mark) == 1]
    bad = [reply for reply, mark in examples if float(mark) == 0]
    return "\n".join(
        criterion
        for criterion, check in CRITERIA.items()
        if all(map(check, good)) and not all(map(check, bad))
    )


async def chat_completions(request: Request) -> JSONResponse:
    body: dict[str, Any] = await request.json()
    message = {"role": "assistant", "content": answered(body["messages"])}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return JSONResponse(
        {
            "id": "judgement",
            "object": "chat.completion",
            "created": 0,
            "model": body.get("model", "scripted"),
            "choices": [choice],
        }
    )


app = Starlette(routes=[Route("/v1/chat/completions", chat_completions, methods=["POST"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8123)
    uvicorn.run(app, host="127.0.0.1", port=parser.parse_args().port, log_level="warning")


if __name__ == "__main__":
    main()
