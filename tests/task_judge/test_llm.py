"""The model as a judge, against an endpoint on the loopback that answers as told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from astuner.config.schema import LlmJudgeConfig, TaskJudgeConfig
from astuner.errors import ConfigError, EngineError, RewardError
from astuner.task_judge import Verdict, make_judge, score
from astuner.task_judge.llm import parse_score
from astuner.types import Task, WorkflowOutput, WorkflowTask


class Endpoint:
    """Answers each request with the next of `answers`: a text, or a status code."""

    def __init__(self) -> None:
        self.answers: list[str | int] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.requests.append(json.loads(body))
                endpoint.keys.append(self.headers["Authorization"])
                answer = endpoint.answers.pop(0)
                status = answer if isinstance(answer, int) else 200
                message = {"role": "assistant", "content": answer}
                reply = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
                self.send_response(status)
                self.send_header("retry-after-ms", "1")
                self.send_header("content-type", "application/json")
                self.end_headers()
                out = reply if status == 200 else {"error": {"message": "told to"}}
                self.wfile.write(json.dumps(out).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()
    thread.join(10)


async def judged(url: str, **settings: Any) -> Verdict:
    llm = LlmJudgeConfig(base_url=url, model="judge-1", api_key_env="ASTUNER_TEST_KEY", **settings)
    judge = make_judge(TaskJudgeConfig(judge_type="llm", llm=llm))
    assert judge is not None
    task = WorkflowTask(task=Task(main_query="2 and 2?", metadata={"answer": "4"}))
    return await score(judge, task, WorkflowOutput(metadata={"last_reply": "four"}))


async def test_what_is_asked_and_what_comes_of_it(endpoint: Endpoint, monkeypatch) -> None:
    monkeypatch.setenv("ASTUNER_TEST_KEY", "secret")
    endpoint.answers = ['Fine. {"score": 1}', "Score: 0.25"]
    assert await judged(endpoint.url, rubric="Right?") == Verdict(1.0, None, True)
    assert await judged(endpoint.url) == Verdict(0.25, None, False)
    asked = endpoint.requests[0]
    assert (asked["model"], asked["temperature"]) == ("judge-1", 0.0)
    system, user = asked["messages"]
    assert system["content"].startswith("Right?\n\nEnd with one line of JSON")
    assert user["content"] == (
        "<question>\n2 and 2?\n</question>\n\n<reference>\n4\n</reference>\n\n"
        "<answer>\nfour\n</answer>"
    )
    assert endpoint.keys == ["Bearer secret"] * 2


async def test_it_is_tried_again(endpoint: Endpoint) -> None:
    endpoint.answers = [503, 429, '{"score": 0.5}']
    assert (await judged(endpoint.url)).reward == 0.5
    assert len(endpoint.requests) == 3


async def test_it_gives_up(endpoint: Endpoint) -> None:
    endpoint.answers = [500, 500, 500]
    with pytest.raises(EngineError) as caught:
        await judged(endpoint.url, max_retries=2)
    told = str(caught.value)
    assert told.startswith(f"The judging model judge-1 at {endpoint.url} answered 500: ")
    assert "told to" in told
    assert endpoint.answers == []


async def test_a_wrong_key_names_the_variable(endpoint: Endpoint, monkeypatch) -> None:
    monkeypatch.delenv("ASTUNER_TEST_KEY", raising=False)
    endpoint.answers = [401]
    with pytest.raises(
        EngineError, match="refused the key in the environment variable ASTUNER_TEST_KEY, which is"
    ):
        await judged(endpoint.url)
    assert len(endpoint.requests) == 1


async def test_nobody_there(endpoint: Endpoint) -> None:
    endpoint.server.server_close()
    with pytest.raises(EngineError) as caught:
        await judged(endpoint.url, max_retries=0, timeout=5.0)
    assert "did not answer (1 attempts of 5 s): Connection error." in str(caught.value)
    assert "Is it running, and base_url right?" in str(caught.value)


async def test_no_score(endpoint: Endpoint) -> None:
    endpoint.answers = ["Hard to say.", "Hard to say."]
    with pytest.raises(RewardError) as caught:
        await judged(endpoint.url)
    assert "judge-1 gave no score between 0 and 1: 'Hard to say.'." in str(caught.value)
    assert "set astuner.task_judge.llm.on_parse_failure: zero" in str(caught.value)
    assert await judged(endpoint.url, on_parse_failure="zero") == Verdict(0.0, None, False)


def test_a_model_is_needed() -> None:
    llm = LlmJudgeConfig(base_url="http://127.0.0.1:1/v1")
    with pytest.raises(ConfigError, match=r"which needs astuner\.task_judge\.llm\.model\."):
        make_judge(TaskJudgeConfig(judge_type="llm", llm=llm))


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ('{"score": 0.7}', 0.7),
        ('```json\n{"score": 0.7, "reason": "x"}\n```', 0.7),
        ('{"score": 0.1} no, {"score": 0.9}', 0.9),
        ('{"score": "0.7"}', 0.7),
        ('{"score": "7/10"}', 0.7),
        ('{"score": true}', 1.0),
        ('{"score": null} Score: 0.3', 0.3),
        ('{"reason": "x"}', None),
        ('{"score": 7}', None),
        ('{"score": "7/0"}', None),
        ("Score: 0.7", 0.7),
        ("**Score:** 7/10", 0.7),
        ("The score is 0.7.", 0.7),
        ("Score: 0.2 ... final score = 0.8", 0.8),
        ("Rating: 1", 1.0),
        ("0.7", 0.7),
        (" .5\n", 0.5),
        ("7/10", 0.7),
        ("Score: -1", None),
        ("Score: 8", None),
        ("I saw 2 errors", None),
        ("", None),
        ('<think>{"score": 0}</think>{"score": 1}', 1.0),
        ('<think>{"score": 1}</think>Hm.', None),
        ('{"a": {"score": 0.4}}', 0.4),
    ],
)
def test_parse_score(reply: str, value: float | None) -> None:
    assert parse_score(reply) == value
