"""What goes wrong between us and a service, and what its user is told."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from astuner.backbone.tinker import connection as connections
from astuner.backbone.tinker.connection import Connection, Offered, Patience
from astuner.backbone.tinker.model import choose, context_of, load_tokenizer, same_tokenizer
from astuner.config.schema import AstunerConfig
from astuner.engine.protocol import AdamParams, LossSpec
from astuner.errors import ConfigError, DeadlineExceeded, EngineError, ModelError
from tests.backbone.tinker.test_gradients import samples
from tests.backbone.tinker.test_policy import config_of, remote
from tests.backbone.tinker.world import KEY, Running, remote_job, running
from tests.ports import held_port

# ---------------------------------------------------------------- before anything starts


def test_nobody_is_there(tiny_model_dir: Path, tmp_path: Path) -> None:
    with held_port() as port:
        job = remote_job(f"http://127.0.0.1:{port}", tiny_model_dir, tmp_path)
        here = r"No service answers at http://127\.0\.0\.1:"
        with pytest.raises(EngineError, match=here) as caught:
            job.tune()
    assert "astuner serve" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_wrong_key(
    service: Running, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-of-somebody-else")
    with pytest.raises(ConfigError, match="refuses the key"):
        remote_job(service.url, tiny_model_dir, tmp_path).tune()


def test_no_key(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY")
    with pytest.raises(ConfigError, match=r"TINKER_API_KEY \(service.api_key_env\) is not set"):
        remote_job("http://127.0.0.1:1", tiny_model_dir, tmp_path).tune()


def test_another_tokenizer(service: Running, tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["<one-more>"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"whose tokens are not those of model\.path"):
        remote_job(service.url, tmp_path / "other", tmp_path / "runs").tune()


def test_tokenizers_are_compared(tiny_model_dir: Path) -> None:
    ours = load_tokenizer(str(tiny_model_dir))
    assert same_tokenizer(ours, ours.name_or_path) is True
    assert same_tokenizer(ours, "nobody/has-this-one") is None
    with pytest.raises(ModelError, match="has no tokenizer that can be loaded"):
        load_tokenizer(str(tiny_model_dir / "missing"))


def config(**service: str) -> AstunerConfig:
    made = AstunerConfig(backbone="tinker")
    made.model.path = "a/b"
    for name, value in service.items():
        setattr(made.service, name, value)
    return made


def models(*names: str, trainable: bool = True) -> list[Offered]:
    return [Offered(name, 512, trainable) for name in names]


@pytest.mark.parametrize(
    ("offered", "base_model", "chosen"),
    [
        (models("x", "a/b"), "", "a/b"),
        (models("x"), "", "x"),
        (models("x", "y"), "y", "y"),
        ([*models("z", trainable=False), *models("x")], "", "x"),
    ],
)
def test_the_model_is_chosen(offered: Sequence[Offered], base_model: str, chosen: str) -> None:
    assert choose(offered, config(base_model=base_model)).name == chosen


@pytest.mark.parametrize(("offered", "base_model"), [(models("x", "y"), ""), (models("x"), "z")])
def test_an_unknown_model(offered: Sequence[Offered], base_model: str) -> None:
    with pytest.raises(ConfigError, match=r"Set service\.base_model to one of: x"):
        choose(offered, config(base_model=base_model))


def test_the_context_is_the_smaller_one() -> None:
    made = config()
    made.data.max_prompt_length, made.data.max_response_length = 100, 200
    assert context_of(made, Offered("x", 250, True)) == 250
    assert context_of(made, Offered("x", None, True)) == 300
    made.rollout.max_model_len = 150
    assert context_of(made, Offered("x", 250, True)) == 150
    with pytest.raises(ConfigError, match=r"data\.max_prompt_length is 100, but the context of x"):
        context_of(made, Offered("x", 100, True))


# ---------------------------------------------------------------- while it runs


async def test_every_wait_has_a_deadline(service: Running) -> None:
    connection = Connection(service.url, KEY, Patience(request=0.2))
    with pytest.raises(DeadlineExceeded, match=r"Something: .* within 0\.2 s \(service\.timeout"):
        await connection.ask("Something", Future[None])


async def test_a_service_that_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LOOK_SECONDS", 0.05)
    with held_port() as port:
        connection = Connection(f"http://127.0.0.1:{port}", KEY, Patience(request=60, outage=0.1))
        with pytest.raises(EngineError, match=r"has been away for 0\.1 s .*--resume"):
            await connection.ask("A step", Future[None])


@pytest.mark.timeout(180)
async def test_a_restarted_service_asks_for_a_resume(tiny_model_dir: Path, tmp_path: Path) -> None:
    data, loss, given = tmp_path / "data", LossSpec("policy_gradient"), samples(proximal=False)
    with held_port() as port, running(tiny_model_dir, data, port) as first:
        made = config_of(first, tiny_model_dir)
        async with remote(made) as model:
            await model.begin()
            await model.forward_backward(given, loss)
            await model.optim_step(AdamParams(lr=1e-3))
            await model.publish()
            await model.save(tmp_path / "kept", optimizer=True)
            await model.forward_backward(given, loss)
            first.close()
            with running(tiny_model_dir, data, port):
                with pytest.raises(EngineError, match=r"was restarted.*go on with --resume"):
                    await model.optim_step(AdamParams(lr=1e-3))
                assert await model.load(tmp_path / "kept", optimizer=True) == 1
                await model.forward_backward(given, loss)
                await model.optim_step(AdamParams(lr=1e-3))


@pytest.mark.timeout(300)
def test_a_run_goes_on_where_it_stopped(
    service: Running, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    remote_job(service.url, tiny_model_dir, tmp_path / "parts", total_steps=1).tune()
    job = remote_job(service.url, tiny_model_dir, tmp_path / "parts", total_steps=3)
    parts = job.tune(resume=True)
    whole = remote_job(service.url, tiny_model_dir, tmp_path / "whole", total_steps=3).tune()
    assert parts.metrics["steps"] == whole.metrics["steps"] == 3
    a, b = (load_file(m.path / "adapter_model.safetensors") for m in (parts, whole))
    assert {name: value.tobytes() for name, value in a.items()} == {
        name: value.tobytes() for name, value in b.items()
    }
    written = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert not [f for f in written if KEY.encode() in f.read_bytes()]
    local = remote_job(service.url, tiny_model_dir, tmp_path / "parts", total_steps=4)
    local.config.backbone, local.config.service.base_url = "local", ""
    with pytest.raises(ConfigError, match="was trained by the tinker backbone"):
        local.tune(resume=True)
