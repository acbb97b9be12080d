"""FakeEngine keeps the rules of the Engine protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import pytest

from astuner.engine.fake import FakeEngine
from astuner.engine.protocol import Engine, SamplingParams, generate
from astuner.errors import ContextLengthError, EngineClosed, EngineError


async def test_cycles_its_script_and_remembers_what_it_was_asked() -> None:
    engine = FakeEngine([[1, 2], [3]], logprob=lambda token: -token / 10, weight_version=4)
    params = SamplingParams(max_tokens=9)
    replies = [await generate(engine, [7, 8], params) for _ in range(3)]
    assert [r.token_ids.tolist() for r in replies] == [[1, 2], [3], [1, 2]]
    assert replies[0].logprobs.tolist() == pytest.approx([-0.1, -0.2])
    assert replies[0].weight_versions.tolist() == [4, 4]
    assert replies[0].finish_reason == "stop"
    assert engine.prompts == [(7, 8)] * 3
    assert engine.params == [params] * 3
    assert (engine.finished, engine.cancelled, engine.active) == (3, 0, 0)
    assert isinstance(engine, Engine)


@pytest.mark.parametrize(
    ("max_tokens", "stops", "ids", "finish"),
    [
        (9, (), [5, 6, 7], "stop"),
        (2, (), [5, 6], "length"),
        (3, (), [5, 6, 7], "length"),
        (3, (7,), [5, 6, 7], "stop"),
        (9, (6,), [5, 6], "stop"),
        (0, (), [], "length"),
    ],
)
async def test_limits(max_tokens: int, stops: tuple[int, ...], ids: list[int], finish: str) -> None:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=stops)
    out = await generate(FakeEngine([[5, 6, 7]]), [1], params)
    assert (out.token_ids.tolist(), out.finish_reason) == (ids, finish)


async def test_context_limit_cuts_the_reply_and_refuses_a_full_prompt() -> None:
    engine = FakeEngine([[5, 6, 7]], max_context=4)
    out = await generate(engine, [1, 2], SamplingParams(max_tokens=9))
    assert (out.token_ids.tolist(), out.finish_reason) == ([5, 6], "length")
    with pytest.raises(ContextLengthError, match="4 tokens"):
        await generate(engine, [1, 2, 3, 4], SamplingParams(max_tokens=9))
    assert len(engine.prompts) == 1


async def test_computed_replies_scripted_errors_and_chunks() -> None:
    def double(prompt: Sequence[int]) -> list[int] | Exception:
        return EngineError("odd") if prompt[0] % 2 else [2 * i for i in prompt]

    engine = FakeEngine(double, chunk_tokens=2, prefill_cached=3)
    params = SamplingParams(max_tokens=9, top_logprobs=2)
    chunks = [c async for c in engine.stream([2, 4, 6], params)]
    assert [c.token_ids for c in chunks] == [(4, 8), (12,)]
    assert [c.prefill_cached for c in chunks] == [3, 0]
    assert chunks[1].top_logprobs == ({12: -0.5, 0: -1.5},)
    with pytest.raises(EngineError, match="odd"):
        await generate(engine, [1], params)


async def test_new_weights_in_the_middle_of_a_reply() -> None:
    engine = FakeEngine([[1, 2, 3]])
    versions: list[int] = []
    async for chunk in engine.stream([0], SamplingParams(max_tokens=9)):
        versions.append(chunk.weight_version)
        engine.weight_version += 1
    assert versions == [0, 1, 2]


async def test_cancellation_is_visible() -> None:
    engine = FakeEngine([[1, 2, 3]], seconds_per_token=60.0)
    task = asyncio.create_task(generate(engine, [0], SamplingParams(max_tokens=9)))
    await asyncio.sleep(0)
    assert engine.active == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    assert (engine.active, engine.cancelled) == (0, 1)


async def test_closing_the_iterator_cancels() -> None:
    engine = FakeEngine([[1, 2, 3]])
    async with aclosing(engine.stream([0], SamplingParams(max_tokens=9))) as stream:
        async for _ in stream:
            break
    assert (engine.active, engine.cancelled, engine.finished) == (0, 1, 0)


async def test_a_closed_engine_says_so() -> None:
    engine = FakeEngine([[1]])
    engine.close()
    with pytest.raises(EngineClosed):
        await generate(engine, [0], SamplingParams(max_tokens=9))


def test_an_empty_script_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one reply"):
        FakeEngine([])
