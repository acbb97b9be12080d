"""Episodes against the real proxy on loopback, with the unmodified openai SDK."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import openai
import pytest

from astuner.chat.protocol import ParsedReply
from astuner.engine.fake import FakeEngine
from astuner.errors import EngineError
from astuner.model_tuner import SessionSampling, TunerServer
from astuner.task_runner import EpisodeRunner, RunnerSettings, Workflow
from astuner.types import Episode, FailureKind, TokenIds, WorkflowOutput, token_ids

from .fakes import LIMIT, task

pytestmark = pytest.mark.timeout(60)
END = 0


class LetterCodec:
    """A prompt is the text of its messages, a reply ends with 0; history is never extended."""

    stop_token_ids = (END,)
    supports_tools = False

    def render(self, messages: Sequence[Any], tools: Any = ()) -> TokenIds:
        return self.encode("|".join(str(m["content"]) for m in messages) + "|")

    def extend(self, *args: Any, **kwargs: Any) -> None:
        return None

    def parse(self, completion_ids: Any, prompt_ids: Any, tools: Any = ()) -> ParsedReply:
        return ParsedReply(self.decode(completion_ids), None, ())

    def encode(self, text: str) -> TokenIds:
        return token_ids(list(text.encode()))

    def decode(self, ids: Any, *, skip_special: bool = True) -> str:
        return bytes(int(i) for i in ids if i != END).decode("utf-8", "replace")


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine([[*b"5", END]])


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[TunerServer]:
    with TunerServer(engine, LetterCodec()) as started:
        yield started


async def run(server: TunerServer, workflow: type[Workflow], **settings: Any) -> Episode:
    values: dict[str, Any] = {"episode_timeout": 20.0, "grace": 0.2} | settings
    runner = EpisodeRunner(workflow, None, server, RunnerSettings(**values))
    sampling = SessionSampling(temperature=1.0, max_tokens=8)
    return await asyncio.wait_for(
        runner.run(task(answer="5"), group_id="g0", seed=1, sampling=sampling), LIMIT
    )


def ask(text: str) -> dict[str, Any]:
    return {"model": "tuned", "messages": [{"role": "user", "content": text}]}


class AsyncAgent(Workflow):
    async def execute(self, workflow_task: Any, tuner: Any) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        reply = await client.chat.completions.create(**ask(workflow_task.main_query))
        return WorkflowOutput(reward=float(reply.choices[0].message.content == "5"))


class BlockingAgent(Workflow):
    """A synchronous client inside an async function: it blocks its own loop, no other."""

    async def execute(self, workflow_task: Any, tuner: Any) -> WorkflowOutput:
        endpoint = tuner.as_oai_baseurl_apikey()
        with openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
            reply = client.chat.completions.create(**ask(workflow_task.main_query))
        return WorkflowOutput(reward=float(reply.choices[0].message.content == "5"))


@pytest.mark.parametrize("agent", [AsyncAgent, BlockingAgent])
async def test_calls_become_samples(server: TunerServer, agent: type[Workflow]) -> None:
    episode = await run(server, agent)
    assert episode.failure is None
    assert episode.reward == 1.0
    (sample,) = episode.samples
    assert sample.token_ids.tolist() == [*b"2+3?|", ord("5"), END]
    assert sample.loss_mask.tolist() == [False] * 5 + [True, True]
    assert sample.logprobs.tolist() == [0.0] * 5 + [-0.5, -0.5]


class WrongKey(Workflow):
    async def execute(self, workflow_task: Any, tuner: Any) -> WorkflowOutput:
        endpoint = tuner.as_oai_baseurl_apikey()
        client = openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="sk-mine")
        async with client:
            await client.chat.completions.create(**ask("hi"))
        return WorkflowOutput(reward=1.0)


async def test_a_wrong_key_is_the_workflows_bug_and_says_where_to_get_the_right_one(
    server: TunerServer,
) -> None:
    episode = await run(server, WrongKey)
    assert episode.failure is not None
    assert (episode.failure.kind, episode.failure.retriable) == (FailureKind.WORKFLOW, False)
    assert "AuthenticationError at test_real_proxy.py" in episode.failure.message
    assert "tuner.as_oai_baseurl_apikey" in episode.failure.message
    assert episode.failure.traceback.count("File ") == 1  # the user's line, not the SDK's
    assert episode.calls == ()


async def test_a_failing_engine_is_infrastructure() -> None:
    engine = FakeEngine([EngineError("Out of memory.")])
    with TunerServer(engine, LetterCodec()) as server:
        episode = await run(server, AsyncAgent)
    assert episode.failure is not None
    assert (episode.failure.kind, episode.failure.retriable) == (FailureKind.ENGINE, True)
    assert "Out of memory." in episode.failure.message


class Swarm(Workflow):
    """Asks of several agents at once, one of which is never answered; swallows what fails."""

    agents: tuple[str, ...] = ()
    engine: ClassVar[FakeEngine]

    async def execute(self, workflow_task: Any, tuner: Any) -> WorkflowOutput:
        clients = [tuner.as_raw_openai_sdk_client(agent) for agent in self.agents]
        first, *others = clients
        calls = [asyncio.create_task(c.chat.completions.create(**ask("slow"))) for c in others]
        while self.engine.active < len(others):
            await asyncio.sleep(0.01)
        with suppress(openai.InternalServerError):
            await first.chat.completions.create(**ask("lost"))
        await asyncio.gather(*calls)
        return WorkflowOutput(reward=0.0)


class ThreeAgents(Swarm):
    agents: tuple[str, ...] = ("a", "b", "c")


class OneAgent(Swarm):
    agents: tuple[str, ...] = ("a", "a", "a")


@pytest.mark.parametrize("swarm", [ThreeAgents, OneAgent])
async def test_a_lost_call_is_not_made_good_by_those_made_beside_it(swarm: type[Swarm]) -> None:
    def replies(prompt: Sequence[int]) -> Any:
        return EngineError("Out of memory.") if bytes(prompt) == b"lost|" else [*b"5", END]

    swarm.engine = engine = FakeEngine(replies, seconds_per_token=1.0)
    with TunerServer(engine, LetterCodec()) as server:
        episode = await run(server, swarm)
    assert [call.response["content"] for call in episode.calls] == ["5", "5"]
    assert episode.failure is not None
    assert (episode.failure.kind, episode.failure.retriable) == (FailureKind.ENGINE, True)
    assert "Out of memory." in episode.failure.message


async def test_a_call_in_the_air_is_cancelled_at_the_deadline() -> None:
    engine = FakeEngine([[*b"555555", END]], seconds_per_token=10.0)
    with TunerServer(engine, LetterCodec()) as server:
        episode = await run(server, BlockingAgent, episode_timeout=3.0, grace=LIMIT / 2)
    assert episode.failure is not None
    assert episode.failure.kind is FailureKind.TIMEOUT
    assert "client.chat.completions.create" in episode.failure.traceback
    assert "1 of its LLM calls were still being answered." in episode.failure.message
    assert "left behind" not in episode.failure.message  # the client was answered, so it ended
    assert (engine.cancelled, engine.finished) == (1, 0)
    assert episode.calls == ()


async def test_a_key_dies_with_its_episode(server: TunerServer) -> None:
    late: list[Any] = []

    class Keeps(Workflow):
        async def execute(self, workflow_task: Any, tuner: Any) -> WorkflowOutput:
            late.append(tuner.as_oai_baseurl_apikey())
            return WorkflowOutput(reward=1.0)

    episode = await run(server, Keeps)
    assert episode.ok
    async with openai.AsyncOpenAI(base_url=late[0].base_url, api_key=late[0].api_key) as client:
        with pytest.raises(openai.AuthenticationError, match=f"{episode.episode_id} has ended"):
            await client.chat.completions.create(**ask("hi"))
