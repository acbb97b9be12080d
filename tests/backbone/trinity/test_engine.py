"""What samples for Trinity, as an Engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from astuner.backbone.spawned.answers import Answer
from astuner.backbone.trinity.engine import (
    ServiceSampler,
    TrinityEngine,
    VllmSampler,
    version_of,
)
from astuner.backbone.trinity.served_weights import BroughtWeights
from astuner.engine.protocol import SamplingParams, generate
from astuner.errors import ContextLengthError, EngineError

END = 9
PARAMS = SamplingParams(max_tokens=3, stop_token_ids=(END,), seed=11)


class Fake:
    """Answers as told."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[list[int], int]] = []

    async def sample(self, prompt_ids: list[int], params: SamplingParams, limit: int) -> Answer:
        self.asked.append((prompt_ids, limit))
        return self.answers.pop(0)


def engine(*answers: Answer) -> tuple[TrinityEngine, Fake]:
    fake = Fake(*answers)
    return TrinityEngine(fake, asyncio.get_running_loop(), max_context=8), fake


async def test_tokens_in_tokens_out() -> None:
    trinity, fake = engine(Answer([5, 6, END], [-0.1, -0.2, -0.3], 4, 4))
    out = await generate(trinity, [1, 2], PARAMS)
    assert (out.token_ids.tolist(), out.finish_reason) == ([5, 6, END], "stop")
    assert out.logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3])
    assert out.weight_versions.tolist() == [4, 4, 4]
    assert (fake.asked, trinity.version, trinity.answers) == ([([1, 2], 3)], 4, 1)


async def test_the_context_bounds_prompt_and_reply() -> None:
    trinity, fake = engine(Answer([5], [-0.1], 0, 0))
    assert (await generate(trinity, [1] * 7, PARAMS)).finish_reason == "length"
    assert fake.asked[0][1] == 1
    with pytest.raises(ContextLengthError):
        await generate(trinity, [1] * 8, PARAMS)


async def test_new_weights_within_a_call_show_in_the_last_token() -> None:
    trinity, _ = engine(Answer([5, 6], [-0.1, -0.2], 4, 5))
    assert (await generate(trinity, [1], PARAMS)).weight_versions.tolist() == [4, 5]


@pytest.mark.parametrize("answer", [Answer([], [], 0, 0), Answer([5], [], 0, 0)])
async def test_what_cannot_be_trained_on_is_an_error(answer: Answer) -> None:
    trinity, _ = engine(answer)
    with pytest.raises(EngineError, match="1 to 3, with a logprob each, were due"):
        await generate(trinity, [1], PARAMS)


def test_the_version_is_in_the_name_that_trinity_gives() -> None:
    run = "tinker://0123:train:0/sampler_weights"
    assert version_of(f"{run}/checkpoints-trinity-sampler-12") == 12
    assert version_of("/models/tiny") == 0


class Remote:
    """A method of a Ray actor that gives one value after the other, and the last for ever."""

    def __init__(self, *values: Any) -> None:
        self.values = list(values)

    async def remote(self) -> Any:
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


async def test_a_service_is_asked_with_our_seed_and_the_newest_weights() -> None:
    pytest.importorskip("tinker", reason="the SDK comes with astuner[service]")
    opened: list[dict[str, str]] = []
    asked: list[Any] = []

    class Client:
        async def sample(self, **request: Any) -> Any:
            asked.append(request)
            return SimpleNamespace(sequences=[SimpleNamespace(tokens=[7], logprobs=[-0.5])])

    async def create(**where: str) -> Client:
        opened.append(where)
        return Client()

    path = "tinker://r/sampler_weights/checkpoints-trinity-sampler-1"
    model = SimpleNamespace(get_model_path=Remote("/models/tiny", path))
    weights = BroughtWeights(model, Path(), resumed=False)
    client = SimpleNamespace(create_sampling_client=create)
    sampler = ServiceSampler(weights, client, open_seconds=20)
    answers = [await sampler.sample([1, 2], PARAMS, 3) for _ in range(3)]
    assert [a.newest for a in answers] == [0, 1, 1]
    assert opened == [{"base_model": "/models/tiny"}, {"model_path": path}]
    params = asked[0]["sampling_params"]
    assert (params.seed, params.max_tokens, list(params.stop)) == (11, 3, [END])
    assert asked[0]["prompt"].to_ints() == [1, 2]


async def test_a_service_that_opens_nothing_is_not_waited_for_for_ever() -> None:
    """Neither by the one that asks it, nor by those that stand behind."""
    pytest.importorskip("tinker", reason="the SDK comes with astuner[service]")

    async def create(**where: str) -> None:
        await asyncio.Event().wait()

    model = SimpleNamespace(get_model_path=Remote("/models/tiny"))
    weights = BroughtWeights(model, Path(), resumed=False)
    client = SimpleNamespace(create_sampling_client=create)
    sampler = ServiceSampler(weights, client, open_seconds=0.05)
    asked = [sampler.sample([1], PARAMS, 3) for _ in range(2)]
    errors = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 20)
    for error in errors:
        assert isinstance(error, EngineError)
        assert "not opened the weights /models/tiny within 0.05 s" in str(error)


async def test_vllm_takes_and_returns_ids() -> None:
    posted: list[Any] = []

    async def post(url: str, json: Any) -> Any:
        posted.append((url, json))
        choice = {"token_ids": [7], "logprobs": {"token_logprobs": [-0.5]}}
        return SimpleNamespace(raise_for_status=lambda: None, json=lambda: {"choices": [choice]})

    model = SimpleNamespace(get_model_version=Remote(-1, 1))
    sampler = VllmSampler(model, "http://x", "tiny", SimpleNamespace(post=post))
    answer = await sampler.sample([1, 2], PARAMS, 3)
    assert (answer.token_ids, answer.logprobs, answer.oldest, answer.newest) == ([7], [-0.5], 0, 1)
    [(url, wire)] = posted
    assert url == "http://x/v1/completions"
    assert (wire["prompt"], wire["return_token_ids"], wire["stop_token_ids"]) == (
        [1, 2],
        True,
        [END],
    )
