"""Many adapters on one base: each as if it were alone, whatever the others do."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from astuner.engine.embedded.host import EmbeddedHost
from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.embedded.steps import kv_layout
from astuner.engine.protocol import (
    AdamParams,
    AdapterHost,
    Completion,
    LoraSpec,
    LossInput,
    LossOutput,
    LossSpec,
    SamplingParams,
    generate,
)
from astuner.errors import CheckpointError, ContextLengthError, EngineError
from astuner.types import Sample

from .test_learner import group, plain_logits
from .tiny import VOCAB, greedy, prompt, slowed, tiny_model
from .tiny_training import k3, policy_gradient, sample, save_tiny, sequence_ratio, tokens

pytestmark = pytest.mark.timeout(60)
LORA = LoraSpec(rank=4, alpha=8)
OTHER = LoraSpec(rank=2, alpha=6, target_modules=["attn", "unembed"])
PG, STEP = LossSpec("pg"), AdamParams(lr=0.03)
PARAMS = SamplingParams(max_tokens=12, seed=5)
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "losses": {"pg": policy_gradient, "seq": sequence_ratio}.__getitem__,
    "kls": {"k3": k3}.__getitem__,
    "micro_batch_tokens": 20,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def host(folder: Path) -> Iterator[EmbeddedHost]:
    host = open_host(folder)
    yield host
    host.close()


def open_host(folder: Path, **settings: Any) -> EmbeddedHost:
    return EmbeddedHost.open(folder, **{"dtype": "float32", **SETTINGS, **settings})


class From:
    """The host as an engine that samples under one set of weights."""

    def __init__(self, host: EmbeddedHost, weights: str = "", tenant: str = "") -> None:
        self.max_context = host.max_context
        self._whose = {"weights": weights, "tenant": tenant}
        self._host = host

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Any:
        return self._host.stream(prompt_ids, params, **self._whose)


@asynccontextmanager
async def held(host: EmbeddedHost) -> AsyncGenerator[None]:
    """What is asked inside is begun together, when the block ends."""
    begun, let_go = threading.Event(), threading.Event()

    def hold() -> bool:
        begun.set()
        return let_go.wait(20)

    holding = asyncio.create_task(host._run("hold", hold, lane="hold"))
    assert await asyncio.to_thread(begun.wait, 20)
    try:
        yield
        await asyncio.sleep(0)  # so that tasks made inside have asked
    finally:
        let_go.set()
    assert await holding


async def draw(host: EmbeddedHost, weights: str = "", seed: int = 0) -> Completion:
    return await generate(From(host, weights), prompt(seed, 40), PARAMS)


def same(a: Completion, b: Completion) -> bool:
    return a.token_ids.tolist() == b.token_ids.tolist() and np.array_equal(a.logprobs, b.logprobs)


async def step(host: EmbeddedHost, adapter: str, samples: Sequence[Sample], seed: int = 0) -> None:
    await host.forward_backward(adapter, samples, PG)
    await host.optim_step(adapter, STEP)


async def logprobs(host: EmbeddedHost, adapter: str) -> np.ndarray:
    return np.concatenate(await host.forward(adapter, group()))


def test_it_is_an_adapter_host(host: EmbeddedHost) -> None:
    assert isinstance(host, AdapterHost)


# ---------------------------------------------------------------- apart


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_adapters_trained_in_turns_are_bitwise_as_if_alone(folder: Path, dtype: str) -> None:
    work = {"a": (LORA, group()), "b": (OTHER, group()[::-1]), "c": (LORA, group()[:2])}
    together = open_host(folder, dtype=dtype)
    for number, (name, (spec, _)) in enumerate(work.items()):
        await together.create(name, spec, seed=number)
    for _ in range(3):  # all verbs at once: micro-batches of the three take turns
        await asyncio.gather(
            *(step(together, name, samples) for name, (_, samples) in work.items())
        )
    for number, (name, (spec, samples)) in enumerate(work.items()):
        alone = open_host(folder, dtype=dtype)
        await alone.create(name, spec, seed=number)
        for _ in range(3):
            await step(alone, name, samples)
        assert np.array_equal(await logprobs(alone, name), await logprobs(together, name))
        id_alone, id_together = await alone.snapshot(name), await together.snapshot(name)
        assert same(await draw(alone, id_alone), await draw(together, id_together))
        alone.close()
    together.close()


async def test_the_host_trains_and_samples_as_the_embedded_model_does(folder: Path) -> None:
    model = EmbeddedModel.open(folder, dtype="float32", lora=LORA, seed=7, **SETTINGS)
    host = open_host(folder)
    await host.create("a", LORA, seed=7)
    for _ in range(2):
        mine = await host.forward_backward("a", group(), PG)
        theirs = await model.forward_backward(group(), PG)
        assert mine.loss == theirs.loss and mine.metrics == theirs.metrics
        assert await host.optim_step("a", STEP) == await model.optim_step(STEP)
    await model.publish()
    snapshot = await host.snapshot("a")
    assert same(await generate(model, prompt(0, 40), PARAMS), await draw(host, snapshot))
    model.close()
    host.close()


async def test_the_base_is_not_affected(host: EmbeddedHost) -> None:
    before = await draw(host)
    await host.create("a", LORA)
    await step(host, "a", group())
    snapshot = await host.snapshot("a")
    assert not same(await draw(host, snapshot), before)
    assert same(await draw(host), before)
    assert (before.weight_versions == 0).all()


async def test_three_weights_at_once_equal_each_alone(host: EmbeddedHost) -> None:
    ids = [""]
    for name, spec in (("a", LORA), ("b", OTHER)):
        await host.create(name, spec)
        await step(host, name, group())
        ids.append(await host.snapshot(name))
    alone = [await draw(host, w, seed) for w in ids for seed in range(3)]
    assert len({tuple(c.token_ids) for c in alone}) == 9
    tasks = [
        generate(From(host, w, tenant="another"), prompt(seed, 40), PARAMS)
        for w in ids
        for seed in range(3)
    ]
    together = await asyncio.gather(*tasks)
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert {c.prefill_cached for c in together} == {0}  # another tenant: nothing is shared


async def test_a_gradient_that_is_not_finite_is_its_adapters_alone(host: EmbeddedHost) -> None:
    for name in ("good", "bad", "expected"):
        await host.create(name, LORA)
    poisoned = [replace(s, advantages=s.advantages * np.float32("inf")) for s in group()]
    await host.forward_backward("good", group(), PG)
    await host.forward_backward("bad", group(), PG)
    with pytest.raises(EngineError, match="advantages"):
        await host.forward_backward("bad", poisoned, PG)
    assert (await host.optim_step("bad", STEP))["skipped"] == 1  # no part of a gradient
    assert (await host.optim_step("good", STEP))["skipped"] == 0
    await step(host, "expected", group())
    assert np.array_equal(await logprobs(host, "good"), await logprobs(host, "expected"))
    await step(host, "bad", group())  # and it goes on
    assert np.array_equal(await logprobs(host, "bad"), await logprobs(host, "expected"))


async def test_a_short_verb_does_not_wait_for_another_adapters_long_one(host: EmbeddedHost) -> None:
    await host.create("long", LORA)
    await host.create("short", LORA)
    done: list[str] = []

    async def verb(adapter: str, samples: Sequence[Sample]) -> None:
        await host.forward(adapter, samples)
        done.append(adapter)

    many = [sample(str(i), (tokens(i, 19), False), (tokens(99 + i, 2), True)) for i in range(40)]
    async with held(host):
        asked = [verb("long", many), verb("long", many[:1]), verb("short", many[:1])]
        verbs = asyncio.gather(*asked)
    await verbs
    assert done == ["short", "long", "long"]


# ---------------------------------------------------------------- snapshots


async def test_a_snapshot_stays_as_it_is_while_training_goes_on(host: EmbeddedHost) -> None:
    await host.create("a", LORA)
    await step(host, "a", group())
    first = await host.snapshot("a")
    before = await draw(host, first)
    assert (before.weight_versions == 1).all()
    stream = host.stream(prompt(3, 9), replace(PARAMS, max_tokens=60), weights=first)
    drawn: list[int] = []
    async with aclosing(stream), asyncio.timeout(30):
        async for chunk in stream:
            if not drawn:
                await step(host, "a", group())
            drawn += chunk.token_ids
    alone = await generate(From(host, first, "new"), prompt(3, 9), replace(PARAMS, max_tokens=60))
    assert drawn == alone.token_ids.tolist()
    second = await host.snapshot("a")
    after = await draw(host, second)
    assert second != first and (after.weight_versions == 2).all()
    assert same(await generate(From(host, first, "t"), prompt(0, 40), PARAMS), before)
    assert not same(after, before)


async def test_an_unchanged_adapter_gives_the_same_snapshot_with_one_more_hold(
    host: EmbeddedHost,
) -> None:
    await host.create("a", LORA)
    first = await host.snapshot("a")
    await host.forward_backward("a", group(), PG)  # a gradient alone changes nothing
    assert await host.snapshot("a") == first
    assert host.stats().snapshots == 1
    await host.release(first)
    await draw(host, first)
    await host.release(first)
    with pytest.raises(EngineError, match=r"no snapshot 'snapshot-1', or not any more"):
        await draw(host, first)
    assert await host.snapshot("a") != first


async def test_releasing_ends_running_streams_and_frees_memory(host: EmbeddedHost) -> None:
    await host.create("a", LORA)
    empty = host.stats()
    numbers = sum(p.numel() for p in host._bank.trained["a"].adapter.parameters.values())
    assert empty.resident_bytes == 4 * numbers  # no optimizer before it is trained
    await step(host, "a", group())
    assert host.stats().resident_bytes == pytest.approx(4 * 5 * numbers, rel=1e-3)
    snapshot = await host.snapshot("a")
    assert host.stats().resident_bytes == pytest.approx(4 * 6 * numbers, rel=1e-3)
    memory = [weakref.ref(p) for p in host._bank.snapshots[snapshot].adapter.parameters.values()]
    memory += [weakref.ref(p) for p in host._bank.trained["a"].adapter.parameters.values()]
    slowed(host._bank._layers.model)
    stream = host.stream(prompt(3, 70), replace(PARAMS, max_tokens=400), weights=snapshot)
    with pytest.raises(EngineError, match="were released while they were sampling"):
        async with aclosing(stream), asyncio.timeout(30):
            async for _ in stream:
                if host.stats().snapshots:
                    await host.release(snapshot)
    await host.release("a")
    stats = host.stats()
    assert (stats.adapters, stats.snapshots, stats.resident_bytes) == (0, 0, 0)
    assert host._scheduler._pool.allocated == 0 and host._scheduler._cache.tokens == 0
    gc.collect()
    assert [r() for r in memory if r() is not None] == []


async def test_names_that_are_not_there(host: EmbeddedHost, tmp_path: Path) -> None:
    await host.create("a", LORA)
    with pytest.raises(EngineError, match="an adapter 'a' already"):
        await host.create("a", LORA)
    for name in ("", "snapshot-1"):
        with pytest.raises(EngineError, match="cannot name an adapter"):
            await host.create(name, LORA)
    for verb in (
        host.forward("x", group()),
        host.forward_backward("x", group(), PG),
        host.optim_step("x", STEP),
        host.snapshot("x"),
        host.restore("x", tmp_path),
    ):
        with pytest.raises(EngineError, match="no adapter 'x'"):
            await verb
    for verb in (host.release("x"), host.export("x", tmp_path), host.score([1, 2], weights="x")):
        with pytest.raises(EngineError, match="no snapshot 'x'"):
            await verb
    with pytest.raises(EngineError, match="no snapshot 'a'"):  # only snapshots sample
        await draw(host, "a")


# ---------------------------------------------------------------- files


async def test_restored_with_its_optimizer_it_goes_on_bitwise(folder: Path, tmp_path: Path) -> None:
    host = open_host(folder)
    await host.create("a", OTHER, seed=1)
    for _ in range(2):
        await step(host, "a", group())
    await host.export("a", tmp_path, optimizer=True)
    await step(host, "a", group())
    other = open_host(folder)
    await other.create("b", OTHER, seed=9)
    await other.forward_backward("b", group(), PG)  # a gradient that is dropped
    await other.restore("b", tmp_path, optimizer=True)
    await step(other, "b", group())
    assert np.array_equal(await logprobs(host, "a"), await logprobs(other, "b"))
    completion = await draw(other, await other.snapshot("b"))
    assert same(completion, await draw(host, await host.snapshot("a")))
    assert (completion.weight_versions == 3).all()
    await other.restore("b", tmp_path)  # without it the moments are forgotten
    await step(other, "b", group())
    assert not np.array_equal(await logprobs(host, "a"), await logprobs(other, "b"))
    host.close()
    other.close()


async def test_a_snapshot_in_a_file_is_peft_s_and_samples_the_same(
    host: EmbeddedHost, folder: Path, tmp_path: Path
) -> None:
    await host.create("a", OTHER)
    await step(host, "a", group())
    snapshot = await host.snapshot("a")
    await host.export(snapshot, tmp_path)
    opened = await host.open_snapshot(tmp_path)
    assert opened != snapshot
    assert same(await draw(host, opened), await draw(host, snapshot))
    plain = PeftModel.from_pretrained(tiny_model(attention="sdpa"), str(tmp_path))
    ids = prompt(0, 20)
    expected = plain_scores(plain, ids)
    scores = await host.score(ids, weights=opened)
    np.testing.assert_allclose(scores.logprobs[1:], expected, atol=1e-4)
    with pytest.raises(EngineError, match="has no optimizer"):
        await host.export(snapshot, tmp_path, optimizer=True)
    with pytest.raises(CheckpointError, match="no adapter that can be read"):
        await host.open_snapshot(tmp_path / "nothing")
    await host.create("c", LORA)
    with pytest.raises(CheckpointError, match="does not fit"):
        await host.restore("c", tmp_path)


def plain_scores(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    chosen = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    return chosen[:, 0].numpy()


# ---------------------------------------------------------------- scores and targets


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_scores_are_bitwise_what_was_sampled(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("astuner.engine.embedded.scoring.PIECE", 24)
    host = open_host(folder, dtype=dtype)
    await host.create("a", LORA)
    await step(host, "a", group())
    snapshot = await host.snapshot("a")
    done = await draw(host, snapshot)
    scores = await host.score([*prompt(0, 40), *done.token_ids], weights=snapshot, top_k=3)
    if dtype == "float32":  # in bfloat16 heads this small take other kernels
        assert np.array_equal(scores.logprobs[40:], done.logprobs)
    np.testing.assert_allclose(scores.logprobs[40:], done.logprobs, atol=0.05)
    assert np.isnan(scores.logprobs[0]) and not np.isnan(scores.logprobs[1:]).any()
    assert scores.top[0] == {} and [len(t) for t in scores.top[1:]] == [3] * 51
    best = scores.top[45]
    assert list(best.values()) == sorted(best.values(), reverse=True)
    top = replace(PARAMS, top_logprobs=3)
    again = await generate(From(host, snapshot), prompt(0, 40), top)
    assert list(again.top_logprobs[5]) == list(best)
    assert (await host.score([5])).logprobs.shape == (1,)
    host.close()


async def test_scores_of_the_base_are_transformers(host: EmbeddedHost) -> None:
    ids = prompt(1, 30)
    scores = await host.score(ids)
    np.testing.assert_allclose(
        scores.logprobs[1:], plain_scores(tiny_model(attention="sdpa"), ids), atol=1e-4
    )
    assert scores.top == ()


async def test_other_targets_than_the_tokens_that_follow(host: EmbeddedHost) -> None:
    await host.create("a", LORA)
    ids, targets = tokens(0, 9), tokens(1, 9)
    item = replace(
        sample("s", (ids[:1], False), (ids[1:], True)), target_ids=np.array(targets, np.int32)
    )
    (seen,) = await host.forward("a", [item])
    logits = plain_logits(tiny_model(), torch.tensor([ids]))
    expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(targets[1:])[:, None])[:, 0]
    np.testing.assert_allclose(seen[1:], expected.detach().numpy(), atol=1e-4)


async def test_logprobs_come_for_tokens_of_weight_0_too(host: EmbeddedHost) -> None:
    """Scored at all positions, trained at some: the gradient is that of those alone."""
    ids = tokens(0, 9)
    masked = sample("s", (ids[:5], False), (ids[5:], True))
    weights = np.where(masked.loss_mask, masked.weights, 0).astype(np.float32)
    everywhere = replace(
        masked, loss_mask=np.arange(9) > 0, weights=weights, advantages=masked.advantages
    )
    for name, item in (("some", masked), ("all", everywhere)):
        await host.create(name, LORA)
        result = await host.forward_backward(name, [item], PG)
        assert (result.logprobs[0] != 0).tolist() == item.loss_mask.tolist()
        await host.optim_step(name, STEP)
    np.testing.assert_allclose(await logprobs(host, "some"), await logprobs(host, "all"), atol=1e-4)


# ---------------------------------------------------------------- what is asked


def wrong(**fields: Any) -> list[Sample]:
    return [replace(group()[0], sample_id="s", **fields)]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (wrong(token_ids=np.full(9, VOCAB, np.int32)), "'s' has the token id 97"),
        (wrong(target_ids=np.full(2, -1, np.int32)), "'s' has the token id -1"),
        (wrong(weights=None), "'s': weights is missing"),
        (wrong(advantages=np.zeros(1, np.float32)), r"advantages is of shape \(1,\)"),
        (wrong(token_ids=np.zeros(0, np.int32)), "'s' has no tokens"),
    ],
)
async def test_samples_that_would_fail_on_the_device(
    host: EmbeddedHost, samples: list[Sample], message: str
) -> None:
    await host.create("a", LORA)
    await host.forward_backward("a", group(), PG)
    with pytest.raises(EngineError, match=message):
        await host.forward_backward("a", samples, PG)
    assert (await host.optim_step("a", STEP))["skipped"] == 0  # the gradient is still there


async def test_too_long_is_too_long(folder: Path) -> None:
    host = open_host(folder, max_context=16)
    await host.create("a", LORA)
    fits, not_any_more = (sample("s", (tokens(0, n), False), ([5], True)) for n in (16, 17))
    await host.forward("a", [fits])
    with pytest.raises(ContextLengthError):
        await host.forward("a", [not_any_more])
    await host.score(tokens(0, 16))
    with pytest.raises(ContextLengthError):
        await host.score(tokens(0, 17))
    with pytest.raises(EngineError, match="its first token"):
        await host.forward("a", [sample("s", (tokens(0, 3), True))])
    host.close()


async def test_a_budget_swaps_and_changes_no_number(folder: Path) -> None:
    roomy, tight = open_host(folder), open_host(folder, adapter_bytes=1)
    for host in (roomy, tight):
        for number, name in enumerate("abc"):
            await host.create(name, LORA, seed=number)
        for _ in range(2):
            await asyncio.gather(*(step(host, name, group()) for name in "abc"))
    for name in "abc":
        assert np.array_equal(await logprobs(roomy, name), await logprobs(tight, name))
        snapshots = await roomy.snapshot(name), await tight.snapshot(name)
        assert same(await draw(roomy, snapshots[0]), await draw(tight, snapshots[1]))
    assert roomy.stats().swaps == 0 and roomy.stats().swapped_bytes == 0
    stats = tight.stats()
    assert stats.swaps > 10 and stats.swapped_bytes > stats.resident_bytes
    assert stats.resident_bytes + stats.swapped_bytes == roomy.stats().resident_bytes
    roomy.close()
    tight.close()


async def test_what_was_moved_goes_on_bitwise(host: EmbeddedHost) -> None:
    """A move to other memory, as between a GPU and the host, between any two verbs."""
    for name in ("still", "moved"):
        await host.create(name, OTHER)
    trained = host._bank.trained["moved"]

    def move() -> None:
        learner = trained.learner
        old = [trained.adapter.flat]
        if learner.nbytes:
            masters = learner.masters
            old += [masters._flat.data, masters._gradient, *masters.moments().values()]
        to = torch.Tensor.to
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(torch.Tensor, "to", lambda self, *args: to(self, *args, copy=True))
            trained.move(torch.device("cpu"))
        for tensor in old:  # whoever still reads it shall be seen
            tensor.fill_(torch.nan)

    for _ in range(3):
        await host._run("move", move)
        for name in ("still", "moved"):
            await host.forward_backward(name, group(), PG)
        await host._run("move", move)
        for name in ("still", "moved"):
            await host.optim_step(name, STEP)
    await host._run("move", move)
    assert np.array_equal(await logprobs(host, "moved"), await logprobs(host, "still"))
    snapshots = [await host.snapshot(name) for name in ("still", "moved")]
    assert same(await draw(host, snapshots[0]), await draw(host, snapshots[1]))


async def test_stats(host: EmbeddedHost) -> None:
    await host.create("a", LORA)
    trained = sum(s.num_trained for s in group())
    await step(host, "a", group())
    await draw(host)
    await generate(From(host), prompt(0, 5), greedy(3))
    stats = host.stats()
    assert (stats.adapters, stats.snapshots, stats.running, stats.waiting) == (1, 0, 0, 0)
    assert (stats.trained_tokens, stats.sampled_tokens) == (trained, 15)
    assert (stats.prefilled_tokens, stats.prefix_hit_tokens) == (39, 4)
    assert stats.queued == 0 and stats.doing in ("idle", "sampling")


async def test_training_that_is_given_up_ends_and_leaves_no_gradient(folder: Path) -> None:
    begun, go, calls = threading.Event(), threading.Event(), []

    def slow(inputs: LossInput) -> LossOutput:
        calls.append(inputs.num_segments)
        begun.set()
        assert go.wait(20)
        return policy_gradient(inputs)

    host = open_host(folder, losses={"pg": slow}.__getitem__)
    await host.create("a", LORA)
    training = asyncio.create_task(host.forward_backward("a", group(), PG))
    assert await asyncio.to_thread(begun.wait, 20)
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    go.set()
    assert (await host.optim_step("a", STEP))["skipped"] == 1
    assert len(calls) == 1
    host.close()


async def test_memory_of_what_was_sampled_does_not_grow_with_the_snapshots(
    host: EmbeddedHost,
) -> None:
    await host.create("a", LORA)
    token = kv_layout(host._bank).bytes_per_token
    taken: list[int] = []
    for _ in range(20):
        await step(host, "a", group())
        snapshot = await host.snapshot("a")
        async with held(host):
            drawing = asyncio.gather(*(draw(host, snapshot, seed) for seed in range(4)))
        await drawing
        taken.append(host.stats().kv_bytes)
    assert taken == [4 * 64 * token] * 20  # four places for the last ones alone
    stats, numbers = host.stats(), host.adapter_size(LORA)
    assert stats.snapshots == 20 and stats.snapshot_bytes == 20 * 4 * numbers
    assert stats.cache_bytes == host._scheduler._cache.tokens * token
