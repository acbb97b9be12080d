"""One proxy, several who answer: by target tag an engine of its own, or another endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from astuner.chat.byte_codec import ByteCodec
from astuner.engine.fake import FakeEngine
from astuner.model_tuner import Session, SessionSampling, SessionSpec, TunerServer, Upstream

pytestmark = pytest.mark.timeout(60)
CODEC = ByteCodec()


def saying(text: str, version: int = 0) -> FakeEngine:
    reply = [*CODEC.encode(text).tolist(), CODEC.stop_token_ids[0]]
    return FakeEngine([reply], weight_version=version)


@pytest.fixture
def elsewhere() -> Iterator[tuple[Upstream, FakeEngine]]:
    engine = saying("from elsewhere")
    with TunerServer(engine, CODEC, model_name="other") as server:
        sampling = SessionSampling(override=False, max_tokens=100)
        session = server.open_session(SessionSpec("other", sampling=sampling, record=False))
        way = session.tuner.as_oai_baseurl_apikey()
        yield Upstream(way.base_url, "other", way.api_key), engine


@pytest.fixture
def session(elsewhere: tuple[Upstream, FakeEngine]) -> Iterator[Session]:
    """Of a proxy whose targets "old" and "user" are not answered by its engine."""
    server = TunerServer(
        saying("new", version=7),
        CODEC,
        engines={"old": saying("old", version=2)},
        endpoints={"user": elsewhere[0]},
    )
    with server:
        spec = SessionSpec("e", seed=1, sampling=SessionSampling(temperature=0.5, max_tokens=20))
        yield server.open_session(spec)


async def ask(session: Session, target: str, **more: Any) -> str:
    client = session.tuner.as_raw_openai_sdk_client(agent_name=target, target_tag=target)
    messages: Any = [{"role": "user", "content": "hi"}]
    reply = await client.chat.completions.create(model="m", messages=messages, **more)
    return reply.choices[0].message.content or ""


async def test_the_target_decides_who_answers(session: Session) -> None:
    said = [await ask(session, target) for target in ("player", "old", "user", "player")]
    assert said == ["new", "old", "from elsewhere", "new"]
    assert [(c.target_tag, c.weight_versions.tolist()[:1]) for c in session.calls] == [
        ("player", [7]),
        ("old", [2]),
        ("user", []),  # no tokens: nothing of it could be trained
        ("player", [7]),
    ]
    assert session.calls[2].response["content"] == "from elsewhere"


async def test_choices_of_one_request_come_from_the_same(session: Session) -> None:
    client = session.tuner.as_raw_openai_sdk_client(target_tag="old")
    messages: Any = [{"role": "user", "content": "hi"}]
    reply = await client.chat.completions.create(model="m", messages=messages, n=2)
    assert [c.message.content for c in reply.choices] == ["old", "old"]


async def test_an_endpoint_gets_what_the_client_asks(
    session: Session, elsewhere: tuple[Upstream, FakeEngine]
) -> None:
    await ask(session, "user", temperature=0.25, max_tokens=50)
    await ask(session, "user")
    params = elsewhere[1].params
    assert [(p.temperature, p.max_tokens) for p in params] == [(0.25, 50), (0.5, 20)]
    assert "overridden_sampling" not in session.counters


async def test_an_endpoint_streams_too(session: Session) -> None:
    client = session.tuner.as_raw_openai_sdk_client(target_tag="user")
    messages: Any = [{"role": "user", "content": "hi"}]
    stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
    parts = [c.choices[0].delta.content or "" async for c in stream if c.choices]
    assert "".join(parts) == "from elsewhere"
    assert len(parts) > 2


async def test_what_an_endpoint_cannot_do_is_refused(session: Session) -> None:
    client = session.tuner.as_raw_openai_sdk_client(target_tag="user")
    with pytest.raises(openai.NotFoundError, match="asked for /v1/chat/completions only"):
        await client.completions.create(model="m", prompt="hi")
    with pytest.raises(openai.NotFoundError, match="whose tokens cannot be counted"):
        await client.post(
            "/responses/input_tokens", body={"model": "m", "input": "hi"}, cast_to=dict[str, Any]
        )
    ours = session.tuner.as_raw_openai_sdk_client(target_tag="old")
    assert (await ours.completions.create(model="m", prompt="hi")).choices[0].text == "old"


def test_who_is_not_trained_may_have_a_model_of_the_workflows_own() -> None:
    with TunerServer(saying("x"), CODEC) as server:
        spec = SessionSpec("e", untrained_targets=frozenset({"user"}))
        tuner = server.open_session(spec).tuner
        assert (tuner.is_trainable("user"), tuner.is_trainable("player")) == (False, True)
        other = object()
        assert tuner.as_agentscope_model(target_tag="user", debug_model=other) is other
        declared = SessionSpec("f", trainable_targets=frozenset({"player", "user"}),
                               untrained_targets=frozenset({"user"}))  # fmt: skip
        tuner = server.open_session(declared).tuner
        assert [tuner.is_trainable(t) for t in ("user", "player", "third")] == [False, True, False]


async def test_an_endpoint_that_is_not_there_fails_the_call_by_name(session: Session) -> None:
    with TunerServer(saying("x"), CODEC, endpoints={"user": Upstream("http://127.0.0.1:9/v1", "m", "")}) as server:  # noqa: E501  # fmt: skip
        alone = server.open_session(SessionSpec("e"))
        with pytest.raises(
            openai.InternalServerError, match=r"127\.0\.0\.1:9.*could not be reached"
        ):
            await ask(alone, "user")
        assert alone.counters["engine_errors"] == 1
        assert await ask(alone, "player") == "x"
