"""The embedded model as its callers see it: exactness, independence, errors, threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.embedded.weights import LoraSpec
from astuner.engine.protocol import (
    AdamParams,
    Completion,
    Engine,
    LossSpec,
    Policy,
    SamplingParams,
    generate,
)
from astuner.errors import ConfigError, ContextLengthError, EngineClosed, EngineError

from .tiny import VOCAB, TinyWeights, greedy, prompt, slowed, tiny_embedded, tiny_model
from .tiny_training import policy_gradient, sample, save_tiny

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def embedded() -> Iterator[tuple[EmbeddedModel, TinyWeights]]:
    model, weights = tiny_embedded()
    yield model, weights
    model.close()


def same(a: Completion, b: Completion) -> bool:
    return a.token_ids.tolist() == b.token_ids.tolist() and np.array_equal(a.logprobs, b.logprobs)


def reference(family: str, ids: list[int], new: int) -> tuple[list[int], list[float]]:
    """Greedy decoding by whole forward passes of transformers' own attention."""
    model = tiny_model(family, attention="eager")
    tokens, logprobs = list(ids), []
    for _ in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1).max()))
    return tokens[len(ids) :], logprobs


@pytest.mark.parametrize("family", ["llama", "qwen3"])
async def test_greedy_equals_transformers(family: str) -> None:
    model, _ = tiny_embedded(family)
    prompts = [prompt(i, n) for i, n in enumerate((1, 2, 7, 40, 70, 130))]
    results = await asyncio.gather(*(generate(model, p, greedy(12)) for p in prompts))
    for ids, result in zip(prompts, results, strict=True):
        tokens, logprobs = reference(family, ids, 12)
        assert result.token_ids.tolist() == tokens
        np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)
        assert result.finish_reason == "length"
    model.close()


async def test_long_prompt_in_chunks_equals_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astuner.engine.embedded.scheduler.PREFILL_TOKENS", 64)
    model, weights = tiny_embedded()
    ids = prompt(5, 200)
    result = await generate(model, ids, greedy(4))
    tokens, logprobs = reference("llama", ids, 4)
    assert result.token_ids.tolist() == tokens
    np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)
    assert weights.forward_rows == [64, 64, 64, 8, 8, 8, 8, 8]  # 199 = 3 * 64 + 7, then decode
    model.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_result_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    params = SamplingParams(max_tokens=70, temperature=0.8, seed=11)
    ids = prompt(0, 37)
    alone, _ = tiny_embedded(dtype=dtype)
    expected = await generate(alone, ids, params)
    crowd, _ = tiny_embedded(dtype=dtype)
    others = [
        generate(
            crowd, prompt(i, 3 + 9 * i), SamplingParams(max_tokens=3 + 5 * i, top_p=0.9, seed=i)
        )
        for i in range(1, 21)
    ]
    among, *_ = await asyncio.gather(generate(crowd, ids, params), *others)
    again = await generate(crowd, ids, params)
    assert again.prefill_cached == 36
    assert same(among, expected)
    assert same(again, expected)
    alone.close()
    crowd.close()


async def test_seeds(embedded: tuple[EmbeddedModel, TinyWeights]) -> None:
    model, _ = embedded
    ids = prompt(1, 10)
    draw = [generate(model, ids, SamplingParams(max_tokens=20, seed=s)) for s in (1, 2, 1)]
    one, two, one_again = await asyncio.gather(*draw)
    assert same(one, one_again)
    assert one.token_ids.tolist() != two.token_ids.tolist()
    fresh = [generate(model, ids, SamplingParams(max_tokens=20)) for _ in range(2)]
    a, b = await asyncio.gather(*fresh)
    assert a.token_ids.tolist() != b.token_ids.tolist()


async def test_logprobs_are_those_of_the_tempered_distribution(
    embedded: tuple[EmbeddedModel, TinyWeights],
) -> None:
    model, _ = embedded
    ids = prompt(2, 9)
    result = await generate(model, ids, SamplingParams(max_tokens=15, temperature=0.7, seed=3))
    whole = torch.tensor([ids + result.token_ids.tolist()])
    with torch.no_grad():
        logits = tiny_model(attention="eager")(whole).logits[0, len(ids) - 1 : -1] / 0.7
    expected = logits.log_softmax(-1)[torch.arange(15), torch.from_numpy(result.token_ids).long()]
    np.testing.assert_allclose(result.logprobs, expected.numpy(), atol=1e-4)


async def test_stop_token_is_part_of_the_output(
    embedded: tuple[EmbeddedModel, TinyWeights],
) -> None:
    model, _ = embedded
    ids = prompt(3, 6)
    free = (await generate(model, ids, greedy(10))).token_ids.tolist()
    stop = free[4]
    at = free.index(stop)
    result = await generate(model, ids, greedy(10, stop_token_ids=(stop,)))
    assert result.token_ids.tolist() == free[: at + 1]
    assert result.finish_reason == "stop"


async def test_top_logprobs(embedded: tuple[EmbeddedModel, TinyWeights]) -> None:
    model, _ = embedded
    result = await generate(model, prompt(4, 6), greedy(3, top_logprobs=2))
    assert [len(top) for top in result.top_logprobs] == [2, 2, 2]
    for token, logprob, top in zip(
        result.token_ids.tolist(), result.logprobs.tolist(), result.top_logprobs, strict=True
    ):
        assert next(iter(top.items())) == (token, pytest.approx(logprob, abs=1e-6))


async def test_context_end() -> None:
    model, _ = tiny_embedded(max_context=20)
    assert model.max_context == 20
    result = await generate(model, prompt(0, 15), greedy(100))
    assert len(result.token_ids) == 5
    assert result.finish_reason == "length"
    with pytest.raises(ContextLengthError, match="20 tokens, but the context limit is 20"):
        model.stream(prompt(0, 20), greedy())
    model.close()


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], {}, "no tokens"),
        ([5, VOCAB], {}, "token id 97, but the model's ids are 0 to 96"),
        ([5, -1], {}, "token id -1"),
        ([5], {"max_tokens": 0}, "max_tokens must be at least 1; it is 0"),
        ([5], {"temperature": -0.5}, "temperature must be a number from 0; it is -0.5"),
        ([5], {"temperature": float("nan")}, "temperature"),
        ([5], {"top_p": 0.0}, "top_p must be above 0"),
        ([5], {"top_k": -1}, "top_k"),
    ],
)
def test_requests_that_cannot_be_served(
    embedded: tuple[EmbeddedModel, TinyWeights], ids: list[int], params: Any, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        embedded[0].stream(ids, SamplingParams(**{"max_tokens": 4, **params}))


async def test_publish_between_two_tokens(embedded: tuple[EmbeddedModel, TinyWeights]) -> None:
    model, weights = embedded
    slowed(weights.model)
    versions: list[int] = []
    async for chunk in model.stream(prompt(0, 5), greedy(100)):
        versions += [chunk.weight_version] * len(chunk.token_ids)
        if model.version == 0:
            assert await model.publish() == 1
    assert len(versions) == 100
    assert versions == sorted(versions)
    assert set(versions) == {0, 1}


async def test_published_weights_sample_and_nothing_old_is_reused(
    embedded: tuple[EmbeddedModel, TinyWeights],
) -> None:
    model, weights = embedded
    ids = prompt(0, 30)
    before = await generate(model, ids, greedy(8))
    await model.publish()
    after = await generate(model, ids, greedy(8))
    assert after.prefill_cached == 0
    assert after.weight_versions.tolist() == [1] * 8
    with torch.no_grad():
        logits = tiny_model(attention="eager")
        logits.load_state_dict(weights.model.state_dict())
        expected = logits(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max()
    assert float(after.logprobs[0]) == pytest.approx(float(expected), abs=1e-4)
    assert before.logprobs.tolist() != after.logprobs.tolist()


async def test_closing_the_iterator_frees_the_slot(
    embedded: tuple[EmbeddedModel, TinyWeights],
) -> None:
    model, weights = embedded
    slowed(weights.model)
    stream = model.stream(prompt(0, 5), greedy(500))
    await anext(stream)
    assert model.stats().running == 1
    await stream.aclose()
    await until(lambda: model.stats().running == 0)
    assert model.stats().sampled_tokens < 500


async def test_cancelled_while_waiting() -> None:
    model, weights = tiny_embedded(max_num_seqs=1)
    slowed(weights.model)
    long = model.stream(prompt(0, 5), greedy(500))
    await anext(long)
    second = asyncio.create_task(generate(model, prompt(1, 5), greedy(5)))
    await until(lambda: model.stats().waiting == 1)
    second.cancel()
    await until(lambda: model.stats().waiting == 0)
    await long.aclose()
    assert len((await generate(model, prompt(1, 5), greedy(5))).token_ids) == 5
    model.close()


def test_two_event_loops_in_two_threads(embedded: tuple[EmbeddedModel, TinyWeights]) -> None:
    model, _ = embedded
    results: dict[int, list[Completion]] = {}

    async def several(first: int) -> list[Completion]:
        return await asyncio.gather(
            *(generate(model, prompt(first + i, 12), greedy(9)) for i in range(4))
        )

    def work(first: int) -> None:
        results[first] = asyncio.run(several(first))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for first in (0, 100):
        for i, result in enumerate(results[first]):
            assert result.token_ids.tolist() == reference("llama", prompt(first + i, 12), 9)[0]


def test_a_loop_that_died_does_no_harm(embedded: tuple[EmbeddedModel, TinyWeights]) -> None:
    model, weights = embedded
    slowed(weights.model)
    loop = asyncio.new_event_loop()
    stream: AsyncIterator[Any] = model.stream(prompt(0, 5), greedy(400))
    loop.run_until_complete(anext(stream))
    loop.close()  # the stream is neither read to its end nor closed
    result = asyncio.run(generate(model, prompt(1, 5), greedy(5)))
    assert len(result.token_ids) == 5
    asyncio.run(until(lambda: model.stats().running == 0))
    assert model.stats().sampled_tokens < 405


async def test_a_failing_forward_fails_its_requests_only(
    embedded: tuple[EmbeddedModel, TinyWeights],
) -> None:
    model, weights = embedded
    original = weights.model.forward
    weights.model.forward = raiser(RuntimeError("kernel exploded"))
    calls = [generate(model, prompt(i, 5), greedy(5)) for i in range(3)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(r) for r in results] == [EngineError] * 3
    assert "kernel exploded" in str(results[0])
    weights.model.forward = original
    assert len((await generate(model, prompt(0, 5), greedy(5))).token_ids) == 5


async def test_out_of_memory_names_the_way_out(
    embedded: tuple[EmbeddedModel, TinyWeights],
) -> None:
    model, weights = embedded
    original = weights.model.forward
    weights.model.forward = raiser(
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
        )
    )
    with pytest.raises(EngineError, match=r"Out of memory while sampling.*rollout.max_num_seqs"):
        await generate(model, prompt(0, 5), greedy(5))
    weights.model.forward = original
    assert len((await generate(model, prompt(0, 5), greedy(5))).token_ids) == 5


async def test_logits_that_are_not_finite(embedded: tuple[EmbeddedModel, TinyWeights]) -> None:
    model, weights = embedded
    with torch.no_grad():
        weights.model.lm_head.weight[7] = float("nan")
    with pytest.raises(EngineError, match="not finite"):
        await generate(model, prompt(0, 5), greedy(5))
    with pytest.raises(EngineError, match="not finite"):
        await generate(model, prompt(0, 5), SamplingParams(max_tokens=5, top_p=0.5))
    assert model.stats().running == 0


async def test_close_fails_who_waits() -> None:
    model, weights = tiny_embedded(max_num_seqs=1)
    slowed(weights.model)
    first = model.stream(prompt(0, 5), greedy(500))
    await anext(first)
    waiting = asyncio.create_task(generate(model, prompt(1, 5), greedy(5)))
    await until(lambda: model.stats().waiting == 1)
    model.close()
    with pytest.raises(EngineClosed):
        await waiting
    with pytest.raises(EngineClosed):
        async for _ in first:
            pass
    with pytest.raises(EngineClosed, match="load it again"):
        await generate(model, prompt(1, 5), greedy(5))
    with pytest.raises(EngineClosed):
        await model.publish()
    assert model.stats().doing == "closed"
    model.close()


async def test_training_verbs(embedded: tuple[EmbeddedModel, TinyWeights], tmp_path: Path) -> None:
    model, _ = embedded
    assert isinstance(model, Engine)
    assert isinstance(model, Policy)
    assert (await model.forward_backward([], LossSpec("ppo"))).loss == 1.5
    assert await model.optim_step(AdamParams(lr=0.25)) == {"grad_norm": 1.0, "lr": 0.25}
    await model.save(tmp_path, optimizer=True)
    assert await model.load(tmp_path, optimizer=False) == 7
    assert model._learner.seen == [f"save {tmp_path} True", f"load {tmp_path} False"]
    assert model.version == 7  # that of the checkpoint, not one more


async def test_a_failing_verb_goes_to_its_caller(
    embedded: tuple[EmbeddedModel, TinyWeights],
) -> None:
    model, _ = embedded
    stream = asyncio.create_task(generate(model, prompt(0, 5), greedy(50)))
    with pytest.raises(ValueError, match="boom in step 1"):
        await model.forward_backward([], LossSpec("boom"))
    with pytest.raises(EngineError, match=r"forward_backward.*3 GiB.*micro_batch_tokens"):
        await model.forward_backward([], LossSpec("oom"))
    assert len((await stream).token_ids) == 50
    assert (await model.forward_backward([], LossSpec("ppo"))).loss == 1.5


@pytest.mark.parametrize("lora", [LoraSpec(rank=4, alpha=8), None])
async def test_sampler_and_trainer_speak_of_the_same_distribution(
    tmp_path: Path, lora: LoraSpec | None
) -> None:
    model = EmbeddedModel.open(
        save_tiny(tmp_path),
        device="cpu",
        dtype="float32",
        lora=lora,
        losses={"pg": policy_gradient}.__getitem__,
    )
    for version in (0, 1):
        ids = prompt(version, 20)
        params = [SamplingParams(max_tokens=9, temperature=0.8, seed=s) for s in range(3)]
        drawn = await asyncio.gather(*(generate(model, ids, p) for p in params))
        samples = [
            sample(str(i), (ids, False), (c.token_ids.tolist(), True)) for i, c in enumerate(drawn)
        ]
        logprobs = await model.forward(samples, temperature=0.8)
        for completion, trained in zip(drawn, logprobs, strict=True):
            assert completion.weight_versions.tolist() == [version] * 9
            np.testing.assert_allclose(completion.logprobs, trained[20:], atol=1e-4)
        await model.forward_backward(samples, LossSpec("pg", temperature=0.8))
        await model.optim_step(AdamParams(lr=0.05))
        moved = await model.forward(samples, temperature=0.8)
        assert np.abs(moved[0][20:] - logprobs[0][20:]).max() > 0.01
        assert await model.publish() == version + 1
    with pytest.raises(EngineError, match="opened without any"):
        await model.forward_backward(samples, LossSpec("pg", kl_coef=0.1))
    model.close()


async def test_sampling_goes_on_between_micro_batches(tmp_path: Path) -> None:
    model = EmbeddedModel.open(
        save_tiny(tmp_path),
        device="cpu",
        dtype="float32",
        lora=None,
        micro_batch_tokens=16,
        losses={"pg": policy_gradient}.__getitem__,
    )
    samples = [sample(str(i), (prompt(i, 6), False), (prompt(90 + i, 9), True)) for i in range(12)]
    stream = model.stream(prompt(0, 5), greedy(400))
    await anext(stream)
    before = model.stats().sampled_tokens
    result = await model.forward_backward(samples, LossSpec("pg"))
    assert result.metrics["micro_batches"] == 12
    assert model.stats().sampled_tokens - before >= 12
    await stream.aclose()
    model.close()


def test_a_failing_load_raises_at_the_caller() -> None:
    def build() -> Any:
        raise ValueError("no weights in this folder")

    before = threading.active_count()
    with pytest.raises(ValueError, match="no weights"):
        EmbeddedModel(build)
    assert threading.active_count() == before


def test_no_sequences_at_all_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs must be at least 1; it is 0"):
        tiny_embedded(max_num_seqs=0)


async def test_stats(embedded: tuple[EmbeddedModel, TinyWeights]) -> None:
    model, _ = embedded
    ids = prompt(0, 40)
    await asyncio.gather(*(generate(model, ids, greedy(6)) for _ in range(5)))
    stats = model.stats()
    assert stats.sampled_tokens == 30
    assert stats.prefilled_tokens == 39  # the prompt once; its last token is decoded
    assert stats.prefix_hit_tokens == 4 * 39
    assert stats.cache_tokens == 39 + 6  # the prompt, its last token and 5 of the 6 drawn
    assert (stats.running, stats.waiting, stats.version) == (0, 0, 0)
    assert stats.tokens_per_second > 0


async def until(condition: Any) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(poll(), 20)


def raiser(error: Exception) -> Any:
    def forward(**_: Any) -> Any:
        raise error

    return forward
