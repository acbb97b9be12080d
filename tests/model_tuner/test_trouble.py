"""Lost answers, dropped streams, edited histories, odd tool arguments, a thousand calls at once.

What is trained must be what the workflow got: a call asked again is one call, an abandoned
one none, and no token is trained twice.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from typing import Any

import anthropic
import httpx
import openai
import pytest

from astuner.chat.byte_codec import ByteCodec, ids
from astuner.chat.protocol import ParsedReply, Tool
from astuner.context_tracker import build_samples
from astuner.engine.fake import FakeEngine
from astuner.errors import EngineError, RequestError
from astuner.model_tuner import Session
from astuner.model_tuner.attempts import Attempts, Claim
from astuner.model_tuner.in_process import InProcessTransport
from astuner.model_tuner.server import TunerServer
from astuner.types import MaskReason, Sample, TokenIds

from .tuner_world import TOOLS, USER, Make, World, reply, sampling


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    for sdk in ("openai", "anthropic"):
        monkeypatch.setattr(f"{sdk}._base_client.INITIAL_RETRY_DELAY", 0.01)
        monkeypatch.setattr(f"{sdk}._base_client.MAX_RETRY_DELAY", 0.02)


class LosingTransport:
    """Answers are made, and then the first of them are lost on the way to the client."""

    def __init__(self, world: World, lost: int, library: str) -> None:
        self._http = import_module(library)
        self._inner = InProcessTransport(world.server.app, self._http)
        self.lost = lost

    async def handle_async_request(self, request: Any) -> Any:
        response = await self._inner.handle_async_request(request)
        if self.lost > 0:
            self.lost -= 1
            await response.aread()
            raise self._http.ReadTimeout("lost", request=request)
        return response

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def aclose(self) -> None: ...


def openai_client(world: World, session: Session, lost: int) -> openai.AsyncOpenAI:
    transport: Any = LosingTransport(world, lost, "httpx")
    http: Any = httpx.AsyncClient(transport=transport)
    key = session.agent("default", "default").api_key
    return openai.AsyncOpenAI(
        base_url="http://in.process/v1", api_key=key, http_client=http, max_retries=3
    )


async def chat(world: World, session: Session, lost: int, stream: bool) -> tuple[str, str]:
    """The answer's id and text."""
    client = openai_client(world, session, lost)
    messages: Any = USER
    if not stream:
        whole = await client.chat.completions.create(model="m", messages=messages)
        return whole.id, whole.choices[0].message.content or ""
    async with client.chat.completions.stream(model="m", messages=messages) as events:
        answer = await events.get_final_completion()
    return answer.id, answer.choices[0].message.content or ""


async def responses(world: World, session: Session, lost: int, stream: bool) -> tuple[str, str]:
    client = openai_client(world, session, lost)
    if not stream:
        whole = await client.responses.create(model="m", input="hi")
        return whole.id, whole.output_text
    async with client.responses.stream(model="m", input="hi") as events:
        answer = await events.get_final_response()
    return answer.id, answer.output_text


async def messages(world: World, session: Session, lost: int, stream: bool) -> tuple[str, str]:
    library = anthropic.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]
    transport: Any = LosingTransport(world, lost, library)
    client = anthropic.AsyncAnthropic(
        base_url="http://in.process",
        api_key=session.agent("default", "default").api_key,
        http_client=anthropic.DefaultAsyncHttpxClient(transport=transport),
        max_retries=3,
    )
    request: dict[str, Any] = {"model": "m", "max_tokens": 50, "messages": USER}
    if not stream:
        answer: Any = await client.messages.create(**request)
    else:
        async with client.messages.stream(**request) as events:
            answer = await events.get_final_message()
    return answer.id, answer.content[0].text


async def completions(world: World, session: Session, lost: int, stream: bool) -> tuple[str, str]:
    client = openai_client(world, session, lost)
    if not stream:
        whole = await client.completions.create(model="m", prompt="hi")
        return whole.id, whole.choices[0].text
    chunks = [c async for c in await client.completions.create(model="m", prompt="hi", stream=True)]
    return chunks[0].id, "".join(c.choices[0].text for c in chunks)


Ask = Callable[[World, Session, int, bool], Awaitable[tuple[str, str]]]
DIALECTS: list[Ask] = [chat, responses, messages]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("ask", [*DIALECTS, completions], ids=lambda a: a.__name__)
async def test_an_answer_that_was_lost_is_given_again(make: Make, ask: Ask, stream: bool) -> None:
    world = make("first", "second", "third")
    session = world.session(sampling=sampling())
    answer_id, text = await ask(world, session, 2, stream)
    assert text == "first"
    assert answer_id.endswith("e1:0")
    assert [c.completion_ids.tolist() for c in session.calls] == [reply("first")]
    assert session.counters == {"calls": 1, "answered_again": 2}
    assert len(world.engine.prompts) == 1
    # What is asked for the first time is a call of its own, however equal.
    assert (await ask(world, session, 0, stream))[1] == "second"
    assert len(session.calls) == 2


@pytest.mark.parametrize("in_process", [True, False])
async def test_a_client_that_times_out_and_asks_again_makes_one_call(
    make: Make, in_process: bool
) -> None:
    world = make("late", "soon", seconds_per_token=60.0)
    world.server.start()
    session = world.session()
    if in_process:
        client = session.tuner.as_raw_openai_sdk_client().with_options(max_retries=2)
    else:
        endpoint = session.tuner.as_oai_baseurl_apikey()
        client = openai.AsyncOpenAI(
            base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=2, timeout=2.0
        )
    messages: Any = USER
    task = asyncio.create_task(client.chat.completions.create(model="m", messages=messages))
    await world.until(lambda: world.engine.active == 1)
    world.engine._seconds_per_token = 0.0
    if in_process:  # there are no timeouts, so the client goes away by itself and comes back
        task.cancel()
        await world.until(lambda: world.engine.active == 0)
        answer = await client.chat.completions.create(
            model="m", messages=messages, extra_headers={"x-stainless-retry-count": "1"}
        )
    else:
        answer = await asyncio.wait_for(task, 20)
    assert answer.choices[0].message.content == "soon"
    await world.until(lambda: session.in_flight == 0)
    assert [c.completion_ids.tolist() for c in session.close()] == [reply("soon")]
    assert session.counters == {"disconnected": 1, "calls": 1}
    late, soon = world.engine.params
    assert late.seed == soon.seed


async def test_one_of_equal_parallel_calls_that_fails_gets_an_answer_of_its_own(make: Make) -> None:
    world = make("a", EngineError("odd"), "b", "c", seconds_per_token=0.01)
    session = world.session()
    client = openai_client(world, session, 0)
    messages: Any = USER
    answers = await asyncio.gather(
        *(client.chat.completions.create(model="m", messages=messages) for _ in range(3))
    )
    assert sorted(a.choices[0].message.content or "" for a in answers) == ["a", "b", "c"]
    assert session.counters == {"calls": 3, "engine_errors": 1}


async def test_an_idempotency_key_makes_one_call(make: Make) -> None:
    world = make("a", "b")
    session = world.session()
    client = openai_client(world, session, 0)

    async def ask(text: str, key: str) -> str:
        messages: Any = [{"role": "user", "content": text}]
        answer = await client.chat.completions.create(
            model="m", messages=messages, extra_headers={"Idempotency-Key": key}
        )
        return answer.choices[0].message.content or ""

    assert [await ask("hi", "k1"), await ask("hi", "k1"), await ask("hi", "k2")] == ["a", "a", "b"]
    assert session.counters == {"calls": 2, "answered_again": 1}
    with pytest.raises(openai.BadRequestError, match="another request") as caught:
        await ask("other", "k1")
    assert caught.value.code == "idempotency_key_reused"


async def test_an_idempotency_key_in_the_air_is_waited_for(make: Make) -> None:
    world = make("a", seconds_per_token=0.02)
    session = world.session()
    client = openai_client(world, session, 0).with_options(max_retries=50)
    messages: Any = USER
    answers = await asyncio.gather(
        *(
            client.chat.completions.create(
                model="m", messages=messages, extra_headers={"Idempotency-Key": "k"}
            )
            for _ in range(2)
        )
    )
    assert {a.id for a in answers} == {"chatcmpl-e1:0"}
    assert len(session.calls) == 1
    assert {p.code for p in session.problems} == {"idempotency_key_in_use"}


def test_attempts_forget_what_is_long_ago() -> None:
    attempts = Attempts()
    for number in range(300):
        with attempts.take(Claim(str(number).encode())) as attempt:
            attempt.answered = number
    with attempts.take(Claim(b"299", again=True)) as attempt:
        assert attempt.answered == 299
    with attempts.take(Claim(b"0", again=True)) as attempt:
        assert attempt.answered is None


def test_an_attempt_that_fails_can_be_made_again() -> None:
    attempts, claim = Attempts(), Claim(b"x", "key")
    with pytest.raises(ZeroDivisionError), attempts.take(claim):
        raise ZeroDivisionError
    with attempts.take(claim) as attempt:
        assert attempt.answered is None
        with pytest.raises(RequestError, match="still being answered"), attempts.take(claim):
            pass
        attempt.answered = 1
    with attempts.take(claim) as attempt:
        assert attempt.answered == 1


# ---------------------------------------------------------------- dropped streams


async def first_event(session: Session, dialect: Ask) -> Any:
    """An open stream of which one event was read."""
    openai_, messages_ = session.tuner.as_raw_openai_sdk_client(), USER
    request: Any = {"model": "m", "messages": messages_, "stream": True}
    if dialect is chat:
        stream: Any = await openai_.chat.completions.create(**request)
    elif dialect is responses:
        stream = await openai_.responses.create(model="m", input="hi", stream=True)
    else:
        client = session.tuner.as_raw_anthropic_sdk_client()
        stream = await client.messages.create(max_tokens=60, **request)
    await asyncio.wait_for(anext(stream), 10)
    return stream


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda a: a.__name__)
async def test_a_stream_dropped_while_tokens_come_is_no_call(make: Make, dialect: Ask) -> None:
    world = make("hello there you", "hello again", seconds_per_token=0.05)
    session = world.session(sampling=sampling())
    stream = await first_event(session, dialect)
    await stream.close()
    await world.until(lambda: session.in_flight == 0)
    assert (world.engine.active, world.engine.cancelled) == (0, 1)
    assert (session.calls, session.counters) == ((), {"disconnected": 1})
    world.engine._seconds_per_token = 0.0
    assert (await dialect(world, session, 0, False))[1] == "hello again"
    assert len(session.close()) == 1


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda a: a.__name__)
async def test_a_stream_dropped_when_all_was_sampled_is_a_call(make: Make, dialect: Ask) -> None:
    world = make("hello")
    session = world.session(sampling=sampling())
    stream = await first_event(session, dialect)
    await world.until(lambda: session.in_flight == 0)
    await stream.close()
    assert [c.completion_ids.tolist() for c in session.close()] == [reply("hello")]


async def test_what_a_client_keeps_of_a_dropped_stream_is_context_only(make: Make) -> None:
    world = make("hello there", "bye")
    session = world.session(sampling=sampling())
    stream = await first_event(session, chat)
    await world.until(lambda: session.in_flight == 0)
    await stream.close()
    client = session.tuner.as_raw_openai_sdk_client()
    kept: Any = [*USER, {"role": "assistant", "content": "hel"}, *USER]
    await client.chat.completions.create(model="m", messages=kept)
    assert [c.new_timeline_reason for c in session.calls] == ["first", "edited_history"]
    trained = [s.token_ids[s.loss_mask].tolist() for s in samples_of(session)]
    assert trained == [reply("hello there"), reply("bye")]


# ---------------------------------------------------------------- edited histories


def samples_of(session: Session) -> tuple[Sample, ...]:
    return build_samples(
        session.calls,
        group_id="g",
        task_id="t",
        reward=1.0,
        trainable_targets=None,
        max_prompt_tokens=None,
        max_total_tokens=None,
    )


async def edited_chat(session: Session, texts: Sequence[str]) -> None:
    client = session.tuner.as_raw_openai_sdk_client()
    history: Any = [{"role": r, "content": t} for r, t in zip(ROLES, texts, strict=True)]
    await client.chat.completions.create(model="m", messages=history)


async def edited_responses(session: Session, texts: Sequence[str]) -> None:
    client = session.tuner.as_raw_openai_sdk_client()
    history: Any = [{"role": r, "content": t} for r, t in zip(ROLES, texts, strict=True)]
    await client.responses.create(model="m", input=history)


async def edited_messages(session: Session, texts: Sequence[str]) -> None:
    client = session.tuner.as_raw_anthropic_sdk_client()
    history: Any = [
        {"role": r, "content": [{"type": "text", "text": t}]}
        for r, t in zip(ROLES, texts, strict=True)
    ]
    await client.messages.create(model="m", max_tokens=60, messages=history)


ROLES = ("user", "assistant", "user")
EDITED = {chat: edited_chat, responses: edited_responses, messages: edited_messages}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda a: a.__name__)
@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (("hi", "yes", "so"), None),
        (("hi", "YES", "so"), "edited_history"),
        (("hi!", "yes", "so"), "edited_history"),
    ],
)
async def test_a_history_edited_between_turns(
    make: Make, dialect: Ask, texts: tuple[str, ...], reason: str | None
) -> None:
    world = make("yes", "no")
    session = world.session(sampling=sampling())
    await dialect(world, session, 0, False)
    await EDITED[dialect](session, texts)
    one, two = session.calls
    assert (two.parent_id, two.new_timeline_reason) == (None if reason else one.call_id, reason)
    expected = f"⟦user\n{texts[0]}⟧\n⟦assistant\n{texts[1]}⟧\n⟦user\n{texts[2]}⟧\n⟦assistant\n"
    assert two.prompt_ids.tolist() == ids(expected)
    samples = samples_of(session)
    assert len(samples) == (2 if reason else 1)
    assert sum(s.num_trained for s in samples) == len(reply("yes")) + len(reply("no"))
    assert all(s.masked.get(MaskReason.TRAINED_ELSEWHERE, 0) == 0 for s in samples)


# ---------------------------------------------------------------- odd tool arguments


class TextArguments(ByteCodec):
    """A family that writes the arguments of its calls as it likes: `<add(...)`."""

    def parse(
        self, completion_ids: TokenIds, prompt_ids: TokenIds, tools: Sequence[Tool] = ()
    ) -> ParsedReply:
        text = self.decode(completion_ids)
        if not text.startswith("<add("):
            return ParsedReply(text, None, ())
        function = {"name": "add", "arguments": text[5:-1]}
        return ParsedReply("", None, ({"id": "c1", "type": "function", "function": function},))


ODD = ["a = 1", '{"a": 1', "[1, 2]", "7", '"x"', '{"a": NaN}', '{"b": 1, "a": 1.0}']


def odd_world(arguments: str) -> World:
    engine = FakeEngine([reply(f"<add({arguments})"), reply("done")])
    return World(engine, TunerServer(engine, TextArguments()))


def assert_extended(session: Session, arguments: str) -> None:
    one, two = session.calls
    assert one.response["tool_calls"][0]["function"]["arguments"] == arguments
    assert two.parent_id == one.call_id
    start = [*one.prompt_ids.tolist(), *reply(f"<add({arguments})")]
    assert two.prompt_ids.tolist() == start + ids("\n⟦tool\nwhat?⟧\n⟦assistant\n")


@pytest.mark.parametrize("arguments", ODD)
async def test_arguments_that_are_not_json_over_chat(arguments: str) -> None:
    session = odd_world(arguments).session(sampling=sampling())
    client = session.tuner.as_raw_openai_sdk_client()
    messages: Any = USER
    answer = await client.chat.completions.create(model="m", messages=messages, tools=TOOLS)
    call: Any = answer.choices[0].message.to_dict()
    assert call["tool_calls"][0]["function"]["arguments"] == arguments
    result = {"role": "tool", "tool_call_id": "c1", "content": "what?"}
    await client.chat.completions.create(model="m", messages=[*messages, call, result], tools=TOOLS)
    assert_extended(session, arguments)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("arguments", ODD)
async def test_arguments_that_are_not_json_over_responses(arguments: str, stream: bool) -> None:
    session = odd_world(arguments).session(sampling=sampling())
    client = session.tuner.as_raw_openai_sdk_client()
    tools: Any = [{"type": "function", **TOOLS[0]["function"]}]
    answer: Any = await client.responses.create(model="m", input="hi", tools=tools, stream=stream)
    if stream:
        answer = [event async for event in answer][-1].response
    assert answer.output[0].arguments == arguments
    result = {"type": "function_call_output", "call_id": "c1", "output": "what?"}
    await client.responses.create(model="m", input=[*USER, *answer.output, result], tools=tools)
    assert_extended(session, arguments)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("arguments", ODD)
async def test_arguments_that_are_not_json_over_messages(arguments: str, stream: bool) -> None:
    session = odd_world(arguments).session(sampling=sampling())
    client = session.tuner.as_raw_anthropic_sdk_client()
    function = TOOLS[0]["function"]
    tool = {n: function[n] for n in ("name", "description")} | {"input_schema": {"type": "object"}}
    request: dict[str, Any] = {"model": "m", "max_tokens": 60, "tools": [tool]}
    if stream:
        async with client.messages.stream(messages=USER, **request) as events:
            answer: Any = await events.get_final_message()
    else:
        answer = await client.messages.create(messages=USER, **request)
    assert isinstance(answer.content[0].input, dict)
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "what?"}
    turns = [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    await client.messages.create(messages=[*USER, *turns], **request)
    assert_extended(session, arguments)


# ---------------------------------------------------------------- a thousand at once


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda a: a.__name__)
async def test_a_thousand_calls_at_once_in_process(make: Make, dialect: Ask) -> None:
    world = make("a", chunk_tokens=2, seconds_per_token=0.2)
    session = world.session(sampling=sampling())
    openai_, anthropic_ = clients_of(session)
    await asyncio.gather(*(once(dialect, openai_, anthropic_, str(i)) for i in range(1000)))
    calls = session.close()
    assert len({c.call_id for c in calls}) == 1000 == len(calls)
    prompts = {bytes(c.prompt_ids.tobytes()) for c in calls}
    assert len(prompts) == 1000
    assert world.engine.peak_active > 500
    assert (session.counters, session.in_flight) == ({"calls": 1000}, 0)


async def test_a_thousand_calls_at_once_over_http(make: Make) -> None:
    world = make("a", chunk_tokens=2, seconds_per_token=0.1)
    world.server.start()
    session = world.session(sampling=sampling())
    endpoint = session.tuner.as_oai_baseurl_apikey()
    answers = await asyncio.gather(*(post(endpoint, str(i)) for i in range(1000)))
    assert {a["choices"][0]["message"]["content"] for a in answers} == {"a"}
    assert len({a["id"] for a in answers}) == 1000 == len(session.close())
    assert session.counters == {"calls": 1000}


async def post(endpoint: Any, text: str) -> Any:
    """By hand: an httpx client needs seconds to keep track of a thousand connections."""
    host, port = endpoint.base_url.removeprefix("http://").split("/")[0].split(":")
    body = json.dumps({"messages": [{"role": "user", "content": text}]})
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
        f"authorization: Bearer {endpoint.api_key}\r\ncontent-length: {len(body)}\r\n\r\n"
        f"{body}".encode()
    )
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def clients_of(session: Session) -> tuple[openai.AsyncOpenAI, anthropic.AsyncAnthropic]:
    tuner = session.tuner
    return tuner.as_raw_openai_sdk_client(), tuner.as_raw_anthropic_sdk_client()


async def once(
    dialect: Ask, openai_: openai.AsyncOpenAI, anthropic_: anthropic.AsyncAnthropic, text: str
) -> None:
    messages_: Any = [{"role": "user", "content": text}]
    if dialect is chat:
        await openai_.chat.completions.create(model="m", messages=messages_)
    elif dialect is responses:
        await openai_.responses.create(model="m", input=text)
    else:
        await anthropic_.messages.create(model="m", max_tokens=9, messages=messages_)
