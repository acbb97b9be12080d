"""Keys, episodes side by side, and calls that are stopped in the air."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import openai
import pytest

from astuner.chat.byte_codec import END
from astuner.errors import RequestError
from astuner.model_tuner.session import call_seed, prompt_digest
from astuner.types import token_ids

from .tuner_world import PROMPT, USER, Make, World, sampling


def ask(client: openai.AsyncOpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="", messages=USER, **more)


def over_http(world: World, session: Any, agent: str = "default") -> openai.AsyncOpenAI:
    endpoint = session.tuner.as_oai_baseurl_apikey(agent)
    return openai.AsyncOpenAI(
        base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0, timeout=20
    )


def test_one_key_for_each_session_agent_and_target(make: Make) -> None:
    world = make("a")
    world.server.start()
    one, two = world.session("e1"), world.session("e2")
    first = one.tuner.as_oai_baseurl_apikey("a", "x")
    assert first == one.tuner.as_oai_baseurl_apikey("a", "x")
    assert first.base_url == world.server.base_url.replace("/v1", "/s1/v1")
    assert first.model == "astuner"
    others = [one.tuner.as_oai_baseurl_apikey("a", "y"), one.tuner.as_oai_baseurl_apikey("b", "x")]
    keys = [e.api_key for e in (first, *others, two.tuner.as_oai_baseurl_apikey("a", "x"))]
    assert len(set(keys)) == 4
    assert all(key.startswith("sk-astuner-") for key in keys)


async def test_every_session_has_an_address_of_its_own_and_the_key_says_who_asks(
    make: Make,
) -> None:
    world = make("a")
    world.server.start()
    one, two = world.session("e1"), world.session("e2")
    addresses = [s.tuner.as_oai_baseurl_apikey().base_url for s in (one, two)]
    assert addresses[0] != addresses[1]
    served = world.session("e3", record=False)
    addresses.append(served.tuner.as_oai_baseurl_apikey().base_url)
    assert addresses[2] == world.server.base_url
    async with httpx.AsyncClient(timeout=20) as client:
        for address in addresses:
            headers = {"Authorization": f"Bearer {one.agent('default', 'default').api_key}"}
            body = {"messages": USER}
            done = await client.post(f"{address}/chat/completions", json=body, headers=headers)
            assert done.json()["choices"][0]["message"]["content"] == "a"
        lost = await client.get(f"{addresses[0]}/v1/models", headers=headers)
        assert lost.status_code == 404
        assert "/v1/v1/models: Not Found. The base URL of this client" in lost.text
    assert (len(one.calls), len(two.calls)) == (3, 0)


def test_no_key_after_the_episode(make: Make) -> None:
    session = make("a").session()
    session.close()
    with pytest.raises(RequestError, match="Episode e1 has ended"):
        session.tuner.as_raw_openai_sdk_client()


SEEDS = [3824807692173501076, 2522464621848021953, 6874856906964377354]


def test_seeds_are_fixed_for_ever() -> None:
    ids = prompt_digest(token_ids(PROMPT))
    assert [call_seed(0, ids, 0), call_seed(0, ids, 1), call_seed(1, ids, 0)] == SEEDS
    assert all(0 <= seed < 2**63 for seed in SEEDS)


@pytest.mark.parametrize("in_process", [True, False])
async def test_parallel_episodes_and_parallel_calls(make: Make, in_process: bool) -> None:
    world = make("a", seconds_per_token=0.25)
    world.server.start()
    sessions = [world.session(f"e{i}", seed=i) for i in range(8)]
    clients = [
        s.tuner.as_raw_openai_sdk_client() if in_process else over_http(world, s) for s in sessions
    ]
    answers = await asyncio.gather(*(ask(c) for c in clients for _ in range(4)))
    assert {a.choices[0].message.content for a in answers} == {"a"}
    for session in sessions:
        calls = session.close()
        assert [c.call_id for c in calls] == [f"{session.spec.episode_id}:{i}" for i in range(4)]
        assert {c.episode_id for c in calls} == {session.spec.episode_id}
        assert [c.completion_ids.tolist() for c in calls] == [[97, END]] * 4
    assert len({p.seed for p in world.engine.params}) == 32
    assert world.engine.peak_active > 8


def test_episodes_in_threads_with_loops_of_their_own(make: Make) -> None:
    world = make("a", seconds_per_token=0.01)
    sessions = [world.session(f"e{i}") for i in range(6)]

    def episode(session: Any) -> None:
        async def work() -> None:
            client = session.tuner.as_raw_openai_sdk_client()
            await asyncio.gather(ask(client), ask(client))

        asyncio.run(work())

    threads = [threading.Thread(target=episode, args=(s,), daemon=True) for s in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [len(s.calls) for s in sessions] == [2] * 6


@pytest.mark.parametrize("in_process", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_closing_the_session_stops_its_calls(
    make: Make, in_process: bool, stream: bool
) -> None:
    world = make([97] * 50, seconds_per_token=0.05)
    world.server.start()
    session = world.session(sampling=sampling())
    client = session.tuner.as_raw_openai_sdk_client() if in_process else over_http(world, session)

    async def read() -> None:
        answer = await ask(client, stream=stream)
        if stream:
            async for _ in answer:
                pass

    task = asyncio.create_task(read())
    await world.until(lambda: session.in_flight == 1 and world.engine.active == 1)
    assert await asyncio.to_thread(session.close) == ()
    with pytest.raises(openai.APIError, match="Episode e1 has ended"):
        await asyncio.wait_for(task, 10)
    await world.until(lambda: world.engine.active == 0)
    assert world.engine.cancelled == 1
    assert (session.calls, session.in_flight) == ((), 0)
    assert session.counters == {"ended_in_flight": 1}


@pytest.mark.parametrize("in_process", [True, False])
async def test_a_client_that_leaves_in_mid_stream(make: Make, in_process: bool) -> None:
    world = make([97] * 50, seconds_per_token=0.05)
    world.server.start()
    session = world.session(sampling=sampling())
    client = session.tuner.as_raw_openai_sdk_client() if in_process else over_http(world, session)
    stream = await ask(client, stream=True)
    await asyncio.wait_for(anext(stream), 10)
    await stream.close()
    await world.until(lambda: world.engine.active == 0 and session.in_flight == 0)
    assert world.engine.cancelled == 1
    assert session.calls == ()
    assert session.counters == {"disconnected": 1}
    again = await ask(client, max_tokens=1)
    assert again.choices[0].message.content == "a"
    first, second = world.engine.params
    assert first.seed == second.seed


@pytest.mark.parametrize("in_process", [True, False])
async def test_a_client_that_gives_up_waiting(make: Make, in_process: bool) -> None:
    world = make([97] * 50, seconds_per_token=60.0)
    world.server.start()
    session = world.session(sampling=sampling())
    client = session.tuner.as_raw_openai_sdk_client() if in_process else over_http(world, session)
    task = asyncio.create_task(ask(client))
    await world.until(lambda: world.engine.active == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await world.until(lambda: world.engine.active == 0 and session.in_flight == 0)
    assert session.calls == ()
    assert session.counters == {"disconnected": 1}


async def test_closing_twice_changes_nothing(make: Make) -> None:
    world = make("a")
    session = world.session()
    await ask(session.tuner.as_raw_openai_sdk_client())
    assert len(session.close()) == 1
    assert len(session.close()) == 1
    assert session.closed and world.server.sessions.sessions == ()


async def test_closing_the_server_ends_its_sessions(make: Make) -> None:
    world = make("a", seconds_per_token=60.0)
    world.server.start()
    session = world.session()
    task = asyncio.create_task(ask(over_http(world, session)))
    await world.until(lambda: world.engine.active == 1)
    await asyncio.to_thread(world.server.close)
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        await asyncio.wait_for(task, 10)
    assert session.closed and world.engine.active == 0


async def test_a_session_that_does_not_record(make: Make) -> None:
    world = make("a")
    session = world.session(record=False, sampling=sampling(override=False))
    client = session.tuner.as_raw_openai_sdk_client()
    for _ in range(2):
        await ask(client)
    await ask(client, seed=5)
    assert (session.close(), session.counters) == ((), {"calls": 3})
    assert [p.seed for p in world.engine.params] == [None, None, 5]
