"""The service's policy beside the embedded one: the same losses, logprobs, gradients and steps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from astuner.algorithm import find_kl, find_loss
from astuner.backbone.tinker.model import TinkerModel, open_model
from astuner.backbone.tinker.run import connect
from astuner.config.schema import AstunerConfig
from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.protocol import AdamParams, LoraSpec, LossSpec, SamplingParams, generate
from astuner.errors import CheckpointError, ContextLengthError, EngineClosed, EngineError
from tests.backbone.tinker.test_gradients import samples
from tests.backbone.tinker.world import Running

ADAM = AdamParams(lr=1e-3, weight_decay=0.01, max_grad_norm=0.5)
SPECS = [
    LossSpec("ppo", {"tis_cap": 2.0}),
    LossSpec("ppo", {"clip_low": 0.1, "clip_high": 0.3}),
    LossSpec("cispo", {"tis_cap": 1.5}),
    LossSpec("importance_sampling"),
    LossSpec("gspo"),
    LossSpec("dro", {"beta": 0.1}),
    LossSpec("ppo", {"tis_cap": 2.0}, kl_coef=0.2, kl_type="k3"),
    LossSpec("cross_entropy"),
]


def config_of(service: Running, model: Path) -> AstunerConfig:
    config = AstunerConfig(backbone="tinker", seed=3)
    config.service.base_url, config.model.path = service.url, str(model)
    config.model.lora.rank = 4
    config.data.max_prompt_length = config.data.max_response_length = 64
    return config


@asynccontextmanager
async def remote(config: AstunerConfig) -> AsyncGenerator[TinkerModel]:
    connection = connect(config)
    await connection.open({})
    try:
        yield await open_model(config, connection)
    finally:
        await asyncio.to_thread(connection.close)


def embedded(model: Path) -> EmbeddedModel:
    return EmbeddedModel.open(
        model,
        device="cpu",
        dtype="float32",
        lora=LoraSpec(4, 8),
        max_context=128,
        seed=3,
        losses=find_loss,
        kls=find_kl,
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.name}-{s.params}-{s.kl_coef}")
async def test_updates_are_those_of_the_embedded_model(
    spec: LossSpec, service: Running, tiny_model_dir: Path
) -> None:
    """An update on fresh samples, then one whose proximal logprobs are known."""
    here = embedded(tiny_model_dir)
    async with remote(config_of(service, tiny_model_dir)) as there:
        await there.begin()
        for proximal in (False, True):
            given = samples(proximal=proximal)
            ours = await here.forward_backward(given, spec)
            theirs = await there.forward_backward(given, spec)
            assert theirs.loss == pytest.approx(ours.loss, rel=1e-4, abs=1e-6)
            same = not proximal or spec.name == "cross_entropy"
            for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
                if same:  # the very weights: to the bit
                    np.testing.assert_array_equal(b, a)
                np.testing.assert_allclose(b, a, atol=1e-5)
            for name in set(ours.metrics) - {"entropy", "packed_tokens"}:
                assert theirs.metrics[name] == pytest.approx(ours.metrics[name], rel=1e-3, abs=1e-6)
            for a, b in zip(await here.forward(given), await there.forward(given), strict=True):
                if same:
                    np.testing.assert_array_equal(b, a)
            mine, other = await here.optim_step(ADAM), await there.optim_step(ADAM)
            if spec.name == "cross_entropy":  # nothing of it is folded: the gradient too
                assert other["grad_norm"] == mine["grad_norm"]
            assert other["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
            assert other["lr"] == mine["lr"]
    here.close()


async def test_sampling_is_that_of_the_embedded_model(
    service: Running, tiny_model_dir: Path
) -> None:
    here = embedded(tiny_model_dir)
    params = SamplingParams(max_tokens=9, seed=11, stop_token_ids=(1,), top_logprobs=2)
    async with remote(config_of(service, tiny_model_dir)) as there:
        await there.begin()
        for version in (0, 1):
            a, b = [await generate(m, [5, 6, 7], params) for m in (here, there)]
            assert b.token_ids.tolist() == a.token_ids.tolist()
            np.testing.assert_allclose(b.logprobs, a.logprobs, atol=1e-5 if version else 0)
            assert b.finish_reason == a.finish_reason
            assert b.weight_versions.tolist() == [version] * len(b.token_ids)
            assert [sorted(t) for t in b.top_logprobs] == [sorted(t) for t in a.top_logprobs]
            for model in (here, there):
                await model.forward_backward(samples(proximal=False), LossSpec("policy_gradient"))
                await model.optim_step(AdamParams(lr=0.05))
                assert await model.publish() == version + 1
        with pytest.raises(ContextLengthError, match="128 tokens"):
            await generate(there, [5] * 128, params)
        cut = await generate(there, [5] * 126, replace(params, stop_token_ids=()))
        assert (len(cut.token_ids), cut.finish_reason) == (2, "length")
    here.close()


@pytest.mark.parametrize(("staleness", "kept"), [(0, 1), (1, 4)])
async def test_what_is_replaced_is_not_kept_where_rollout_and_training_take_turns(
    staleness: int, kept: int, service: Running, tiny_model_dir: Path
) -> None:
    config, shelf = config_of(service, tiny_model_dir), service.service.shelf
    config.rollout.max_staleness = staleness
    params = SamplingParams(max_tokens=3, seed=1)
    before = shelf.resident
    async with remote(config) as model:
        await model.begin()
        for step in range(1, 5):
            await model.forward_backward(samples(proximal=False), LossSpec("policy_gradient"))
            await model.optim_step(AdamParams(lr=0.01))
            assert await model.publish() == step
            drawn = await generate(model, [5, 6], params)
            assert drawn.weight_versions.tolist() == [step] * len(drawn.token_ids)
        assert shelf.resident - before == kept


async def test_a_state_goes_on_and_old_ones_are_deleted(
    service: Running, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config, loss = config_of(service, tiny_model_dir), LossSpec("policy_gradient")
    given = samples(proximal=False)
    async with remote(config) as one:
        await one.begin()
        for step in (1, 2):
            await one.forward_backward(given, loss)
            await one.optim_step(ADAM)
            assert await one.publish() == step
            await one.save(tmp_path / "kept", optimizer=True)
        state = json.loads((tmp_path / "kept" / "service_state.json").read_text())
        rest = one.connection.rest()
        run = state["path"].removeprefix("tinker://").partition("/")[0]
        found = await one.connection.ask("", lambda: rest.list_checkpoints(run))
        assert [c.tinker_path for c in found.checkpoints] == [state["path"]]
        await one.forward_backward(given, loss)
        await one.optim_step(ADAM)
        expected = await one.forward(given)
    async with remote(config) as two:
        assert await two.load(tmp_path / "kept", optimizer=True) == 2
        assert two.version == 2
        await two.forward_backward(given, loss)
        await two.optim_step(ADAM)
        for a, b in zip(expected, await two.forward(given), strict=True):
            np.testing.assert_array_equal(b, a)
        await two.connection.delete(state["path"])
        with pytest.raises(CheckpointError, match="There is no checkpoint tinker://"):
            await two.load(tmp_path / "kept", optimizer=True)
        with pytest.raises(CheckpointError, match="no checkpoint of the tinker backbone"):
            await two.load(tmp_path, optimizer=True)


async def test_a_loss_that_the_service_refuses_is_computed_here(
    service: Running, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from astuner.service import datums

    given, spec = samples(proximal=False), LossSpec("ppo", {"tis_cap": 2.0})
    async with remote(config_of(service, tiny_model_dir)) as model:
        await model.begin()
        known = await model.forward_backward(given, spec)
        norm = (await model.optim_step(AdamParams(lr=0.0)))["grad_norm"]
    lacking = {name: loss for name, loss in datums.LOSSES.items() if name != "cispo"}
    monkeypatch.setattr(datums, "LOSSES", lacking)
    async with remote(config_of(service, tiny_model_dir)) as model:
        await model.begin()
        refused = await model.forward_backward(given, spec)
        assert refused.loss == pytest.approx(known.loss, rel=1e-5)
        again = (await model.optim_step(AdamParams(lr=0.0)))["grad_norm"]
        assert again == pytest.approx(norm, rel=1e-5)
        with pytest.raises(EngineError, match=r"temperature 1, not 0\.5"):
            await model.forward_backward(given, replace(spec, temperature=0.5))


async def test_a_first_batch_that_fails_for_another_reason_is_not_sent_again(
    service: Running, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a loss that is not finite nor trouble of the service says that the loss is not
    there; sent on another path as well, a part of the batch might count twice."""
    given, spec = samples(proximal=False), LossSpec("ppo", {"tis_cap": 2.0})
    host: Any = service.base.host
    whole, asked = host.forward_backward, 0
    for error in (EngineError("The loss is nan."), EngineClosed("The engine was closed.")):

        async def failing(*args: Any, wrong: Exception = error) -> None:
            nonlocal asked
            asked += 1
            raise wrong

        async with remote(config_of(service, tiny_model_dir)) as model:
            await model.begin()
            with monkeypatch.context() as patch:
                patch.setattr(host, "forward_backward", failing)
                with pytest.raises(EngineError, match=str(error)):
                    await model.forward_backward(given, spec)
    assert asked == 2 and host.forward_backward == whole
