"""The rollout server without Ray: parameters, aborting and going on, new weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from astuner.backbone.verl_cpu.memory_file import MemoryFile
from astuner.backbone.verl_cpu.server import Limits, RolloutServer, read_sampling
from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.embedded.received import open_received, write_weights
from astuner.engine.protocol import SamplingParams
from astuner.errors import ContextLengthError, EngineError
from tests.engine.embedded.tiny import slowed

pytestmark = pytest.mark.timeout(60)
LIMITS = Limits(prompt_length=60, response_length=40, end_tokens=frozenset({2}))
PROMPT = [5, 17, 30, 11]


@pytest.fixture
def model(tiny_model_dir: Path) -> Iterator[EmbeddedModel]:
    model = open_received(tiny_model_dir, dtype="float32", max_context=600)
    yield model
    model.close()


@pytest.fixture
async def server(model: EmbeddedModel) -> AsyncIterator[RolloutServer]:
    async with asyncio.timeout(50):
        yield RolloutServer(model, LIMITS)


def noisy(model: EmbeddedModel, seed: int) -> list[tuple[str, torch.Tensor]]:
    """The model's weights and some noise."""
    torch.manual_seed(seed)
    weights: Any = model._weights
    state = weights.states.select("published").state_dict()
    return [(name, value + 0.05 * torch.randn_like(value)) for name, value in state.items()]


def slowly(model: EmbeddedModel) -> None:
    """500 tokens take five seconds."""
    weights: Any = model._weights
    slowed(weights.states.select("published"))


async def until(server: RolloutServer, running: int) -> None:
    while len(server._reading) < running:
        await asyncio.sleep(0.001)


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("sampling", "prompt", "expected"),
    [
        ({}, 10, SamplingParams(max_tokens=40, stop_token_ids=(2,))),
        ({}, 75, SamplingParams(max_tokens=25, stop_token_ids=(2,))),  # 60 + 40 - 75
        ({"max_tokens": 7}, 10, SamplingParams(max_tokens=7, stop_token_ids=(2,))),
        ({"max_new_tokens": 8}, 10, SamplingParams(max_tokens=8, stop_token_ids=(2,))),
        ({"max_tokens": 500}, 190, SamplingParams(max_tokens=10, stop_token_ids=(2,))),
        ({"max_tokens": 1, "top_k": -1}, 1, SamplingParams(max_tokens=1, stop_token_ids=(2,))),
        (
            {
                "temperature": 0.7,
                "top_p": 0.9,
                "top_k": 5,
                "stop_token_ids": [9, 3],
                "ignore_eos": True,
                "seed": 4,
                "max_tokens": 3,
                "logprobs": True,
                "repetition_penalty": 1.0,
            },
            10,
            SamplingParams(
                max_tokens=3,
                temperature=0.7,
                top_p=0.9,
                top_k=5,
                stop_token_ids=(3, 9),
                seed=4,
            ),
        ),
    ],
)
def test_sampling_parameters(
    sampling: dict[str, Any], prompt: int, expected: SamplingParams
) -> None:
    assert read_sampling(sampling, prompt, LIMITS, 200) == expected


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"stop": ["\n"]}, r"stop=\['\\n'\]"),
        ({"logit_bias": {}}, "logit_bias"),
    ],
)
def test_what_cannot_be_honoured_is_refused(sampling: dict[str, Any], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        read_sampling(sampling, 10, LIMITS, 200)


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(ContextLengthError):
        read_sampling({}, 200, LIMITS, 200)


# ---------------------------------------------------------------- replies


async def test_it_ends_at_stop_tokens_and_lengths(server: RolloutServer) -> None:
    free = await server.generate(PROMPT, {"max_tokens": 6, "seed": 1, "ignore_eos": True})
    assert len(free.token_ids) == len(free.logprobs) == 6
    assert free.stop_reason == "length" and free.version == 0
    third = free.token_ids[2]
    assert third not in free.token_ids[:2]
    asked = {"max_tokens": 6, "seed": 1, "ignore_eos": True, "stop_token_ids": [third]}
    cut = await server.generate(PROMPT, asked)
    assert cut.token_ids == free.token_ids[:3] and cut.stop_reason == "stop"


async def test_logprobs_are_of_the_distribution_drawn_from(server: RolloutServer) -> None:
    asked = {"max_tokens": 5, "ignore_eos": True}
    one = await server.generate(PROMPT, {**asked, "top_k": 1, "temperature": 3.0})
    assert one.logprobs == [0.0] * 5  # of a single token all probability
    flat = await server.generate(PROMPT, {**asked, "temperature": 1e6})
    vocabulary = server._model._weights.vocab_size
    assert flat.logprobs == pytest.approx([-torch.tensor(vocabulary).log().item()] * 5, rel=1e-3)


async def test_an_aborted_reply_is_what_there_is_and_goes_on(
    server: RolloutServer, model: EmbeddedModel
) -> None:
    slowly(model)
    asked = {"max_tokens": 500, "seed": 3, "ignore_eos": True}
    first = asyncio.create_task(server.generate(PROMPT, asked))
    await until(server, running=1)
    while model.stats().sampled_tokens < 5:
        await asyncio.sleep(0.001)
    assert await server.pause() == 1
    partial = await first
    assert partial.stop_reason == "aborted"
    assert 0 < len(partial.token_ids) == len(partial.logprobs) < 500
    await server.resume()
    rest = {**asked, "max_tokens": 20}
    again = await server.generate([*PROMPT, *partial.token_ids], rest)
    assert len(again.token_ids) == 20 and again.stop_reason == "length"
    # The same request as a first one: the continuation had random numbers of its own.
    fresh = await server.generate([*PROMPT, *partial.token_ids], rest)
    assert fresh.token_ids != again.token_ids


async def test_requests_wait_while_it_is_paused(server: RolloutServer) -> None:
    await server.pause()
    waiting = asyncio.create_task(server.generate(PROMPT, {"max_tokens": 2, "ignore_eos": True}))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await server.resume()
    assert len((await waiting).token_ids) == 2


async def test_requests_are_turned_away_when_no_resume_is_near(server: RolloutServer) -> None:
    await server.pause()
    waiting = asyncio.create_task(server.generate(PROMPT, {"max_tokens": 2}))
    await asyncio.sleep(0)
    await server.pause(reject=True)
    for reply in (await waiting, await server.generate(PROMPT, {"max_tokens": 2})):
        assert reply.token_ids == [] and reply.stop_reason == "aborted"


async def test_a_caller_who_leaves_frees_the_model(
    server: RolloutServer, model: EmbeddedModel
) -> None:
    call = asyncio.create_task(server.generate(PROMPT, {"max_tokens": 500, "ignore_eos": True}))
    await until(server, running=1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    while model.stats().running:
        await asyncio.sleep(0.01)
    assert not server._reading


async def test_no_reply_has_tokens_of_two_weights(
    server: RolloutServer, model: EmbeddedModel
) -> None:
    slowly(model)
    asked = {"max_tokens": 500, "ignore_eos": True}
    before = asyncio.create_task(server.generate(PROMPT, asked))
    await until(server, running=1)
    with MemoryFile("test") as file:
        write_weights(file.path, noisy(model, 1), version=4)
        assert await server.update(file.path) == 4
    assert (await before).stop_reason == "aborted" and (await before).version == 0
    after = await server.generate(PROMPT, {"max_tokens": 3, "ignore_eos": True})
    assert after.version == 4 and len(after.token_ids) == 3  # open again, as it was


async def test_an_update_leaves_a_paused_server_paused(
    server: RolloutServer, model: EmbeddedModel
) -> None:
    await server.pause()
    with MemoryFile("test") as file:
        write_weights(file.path, noisy(model, 1), version=1)
        await server.update(file.path)
    waiting = asyncio.create_task(server.generate(PROMPT, {"max_tokens": 2}))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await server.resume()
    assert (await waiting).version == 1
