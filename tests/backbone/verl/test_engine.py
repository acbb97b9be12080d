"""verl's client as an Engine."""

from __future__ import annotations

import asyncio

import pytest

from astuner.backbone.verl.engine import VerlEngine
from astuner.engine.protocol import SamplingParams, generate
from astuner.errors import ContextLengthError, EngineClosed, EngineError
from tests.backbone.verl.verl_world import END, OK, FakeServers, answer

PARAMS = SamplingParams(max_tokens=3, temperature=0.5, stop_token_ids=(END,), seed=11, session="e1")


def engine(servers: FakeServers, **given: object) -> VerlEngine:
    fields: dict[str, object] = {"max_context": 8, "seeded": True} | given
    return VerlEngine(servers, asyncio.get_running_loop(), **fields)  # type: ignore[arg-type]


async def test_a_call_goes_out_under_verls_names() -> None:
    servers = FakeServers()
    out = await generate(engine(servers), [1, 2], PARAMS)
    assert (out.token_ids.tolist(), out.logprobs.tolist()) == (OK, [-0.25, -0.5, -0.75])
    assert (out.weight_versions.tolist(), out.finish_reason) == ([3, 3, 3], "stop")
    expected = {"temperature": 0.5, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
    expected |= {"max_tokens": 3, "logprobs": True, "stop_token_ids": [END], "seed": 11}
    assert servers.calls == [("e1", [1, 2], expected)]


async def test_vllm_gets_no_seed_and_calls_without_a_session_an_id_of_their_own() -> None:
    servers = FakeServers()
    plain = engine(servers, seeded=False)
    for _ in range(2):
        await generate(plain, [1], SamplingParams(max_tokens=3, seed=1, top_k=5))
    (first, _, wire), (second, _, _) = servers.calls
    assert first != second and len(first) == 32
    assert "seed" not in wire and wire["top_k"] == 5 and "stop_token_ids" not in wire


async def test_the_context_bounds_prompt_and_reply() -> None:
    servers = FakeServers(lambda n: answer([70]))
    out = await generate(engine(servers), [1] * 7, PARAMS)
    assert servers.calls[0][2]["max_tokens"] == 1 and out.finish_reason == "length"
    with pytest.raises(ContextLengthError, match="8 tokens, but the context limit is 8"):
        await generate(engine(servers), [1] * 8, PARAMS)


@pytest.mark.parametrize(
    ("ids", "finish"), [(OK, "stop"), ([70, 71, 72], "length"), ([70, 71], "stop"), ([END], "stop")]
)
async def test_verl_says_completed_of_both(ids: list[int], finish: str) -> None:
    out = await generate(engine(FakeServers(lambda n: answer(ids))), [1], PARAMS)
    assert out.finish_reason == finish


async def test_a_weight_update_within_a_call_shows_in_the_last_token() -> None:
    spans = [answer(OK, 3, 5), answer([END], 4, 6)]
    asked = engine(FakeServers(lambda n: spans[n]))
    out = await generate(asked, [1], PARAMS)
    assert (out.token_ids.tolist(), out.weight_versions.tolist()) == (OK, [3, 3, 5])
    assert out.logprobs.tolist() == [-0.25, -0.5, -0.75] and out.finish_reason == "stop"
    # A first attempt that sampled nothing: the token is of the newest weights.
    assert (await generate(asked, [1], PARAMS)).weight_versions.tolist() == [6]
    assert (asked.version, asked.answers) == (6, 2)


async def test_alternatives_are_the_token_itself() -> None:
    out = await generate(engine(FakeServers()), [1], SamplingParams(max_tokens=3, top_logprobs=2))
    assert out.top_logprobs == ({78: -0.25}, {74: -0.5}, {END: -0.75})


async def test_prompt_tokens_found_in_the_cache_are_told() -> None:
    reply = answer()
    reply.extra_fields["num_cached_tokens"] = 5
    assert (await generate(engine(FakeServers(lambda n: reply)), [1], PARAMS)).prefill_cached == 5


async def test_more_tokens_than_asked_for_are_refused() -> None:
    servers = FakeServers(lambda n: answer([70] * 4))
    with pytest.raises(EngineError, match="answered 4 tokens; 1 to 3 were due"):
        await generate(engine(servers), [1], PARAMS)


async def test_any_thread_may_ask_and_a_call_runs_on_the_workers_loop() -> None:
    servers = FakeServers()
    asked = engine(servers)

    def elsewhere() -> list[int]:
        return asyncio.run(generate(asked, [1], PARAMS)).token_ids.tolist()

    assert await asyncio.wait_for(asyncio.to_thread(elsewhere), 10) == OK
    assert servers.loops == {asyncio.get_running_loop()}


async def test_leaving_cancels_the_call() -> None:
    servers = FakeServers()
    servers.gate = asyncio.Event()
    task = asyncio.create_task(generate(engine(servers), [1], PARAMS))
    while not servers.calls:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(3):
        await asyncio.sleep(0)
    assert servers.cancelled == 1


async def test_a_worker_that_has_ended_answers_no_more() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    dead = VerlEngine(FakeServers(), loop, max_context=8)
    with pytest.raises(EngineClosed, match="has ended"):
        await generate(dead, [1], PARAMS)
