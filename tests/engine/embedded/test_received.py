"""A sampling model that takes its weights from a file, between two ticks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.embedded.received import open_received, read_weights, write_weights
from astuner.engine.protocol import AdamParams, SamplingParams, generate
from astuner.errors import EngineError

from .tiny import prompt, slowed, tiny_model
from .tiny_training import save_tiny

pytestmark = pytest.mark.timeout(60)
PARAMS = SamplingParams(max_tokens=12, seed=7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def follower(folder: Path) -> Iterator[EmbeddedModel]:
    model = open_received(folder, dtype="float32")
    yield model
    model.close()


def other_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the folder, and something added to each."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    return {n: p + 0.3 * torch.randn_like(p) for n, p in model.state_dict().items()}


def save_other(folder: Path, place: Path) -> Path:
    """The folder again, with the other weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(other_weights(folder))
    model.save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            (place / name).write_bytes((folder / name).read_bytes())
    return place


async def test_received_weights_sample_like_a_model_that_was_loaded_with_them(
    follower: EmbeddedModel, folder: Path, tmp_path: Path
) -> None:
    ids = prompt(3, 40)
    before = await generate(follower, ids, PARAMS)  # its KV is in the prefix cache now
    write_weights(tmp_path / "w", other_weights(folder).items(), version=5)
    assert await follower.load(tmp_path / "w", optimizer=False) == 5
    after = await generate(follower, ids, PARAMS)
    fresh = open_received(save_other(folder, tmp_path / "o"), dtype="float32")
    expected = await generate(fresh, ids, PARAMS)
    fresh.close()
    assert after.token_ids.tolist() == expected.token_ids.tolist()
    assert np.array_equal(after.logprobs, expected.logprobs)  # bitwise: no old KV was used
    assert not np.array_equal(after.logprobs, before.logprobs)
    assert (before.weight_versions == 0).all() and (after.weight_versions == 5).all()
    assert after.prefill_cached == 0


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
async def test_tied_weights_may_come_under_either_name(
    folder: Path, tmp_path: Path, name: str
) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(folder)
    tensors = other_weights(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    both = await logprobs_with(folder, tensors, tmp_path / "both")
    one = {n: t for n, t in tensors.items() if n == name or tensors[name] is not t}
    assert len(one) == len(tensors) - 1
    assert await logprobs_with(folder, one, tmp_path / "one") == both


async def test_untied_weights_must_both_come(follower: EmbeddedModel, folder: Path) -> None:
    tensors = other_weights(folder)
    del tensors["lm_head.weight"]
    write_weights(folder / "w", tensors.items(), version=1)
    with pytest.raises(EngineError, match=r"1 missing, e\.g\. lm_head"):
        await follower.load(folder / "w", optimizer=False)


async def logprobs_with(folder: Path, tensors: dict[str, torch.Tensor], place: Path) -> list[float]:
    model = open_received(folder, dtype="float32")
    write_weights(place, tensors.items(), version=1)
    try:
        await model.load(place, optimizer=False)
        return (await generate(model, prompt(3, 40), PARAMS)).logprobs.tolist()
    finally:
        model.close()


async def test_weights_that_do_not_fit_leave_the_old_ones(
    follower: EmbeddedModel, folder: Path, tmp_path: Path
) -> None:
    ids = prompt(1, 20)
    before = await generate(follower, ids, PARAMS)
    tensors = other_weights(folder)
    first = next(iter(tensors))
    for change, message in (
        ({first: tensors[first][:-1]}, f"1 of another shape, e.g. {first}"),
        ({"base_model.x": tensors[first]}, "1 unknown, e.g. base_model.x"),
    ):
        write_weights(tmp_path / "w", {**tensors, **change}.items(), version=9)
        with pytest.raises(EngineError, match=message):
            await follower.load(tmp_path / "w", optimizer=False)
    after = await generate(follower, ids, PARAMS)
    assert np.array_equal(after.logprobs, before.logprobs) and follower.version == 0


async def test_a_running_reply_goes_on_under_the_new_version(
    follower: EmbeddedModel, folder: Path, tmp_path: Path
) -> None:
    write_weights(tmp_path / "w", other_weights(folder).items(), version=2)
    weights: Any = follower._weights
    slowed(weights.states.select("published"), 0.003)
    versions: list[int] = []
    stream = follower.stream(prompt(2, 8), SamplingParams(max_tokens=1000, seed=1))
    async with aclosing(stream), asyncio.timeout(30):
        async for chunk in stream:
            versions += [chunk.weight_version] * len(chunk.token_ids)
            if follower.version == 0:
                await follower.load(tmp_path / "w", optimizer=False)
    assert len(versions) == 504  # to the end of the context
    assert versions[0] == 0 and versions[-1] == 2 and versions == sorted(versions)


async def test_it_refuses_to_train(follower: EmbeddedModel, tmp_path: Path) -> None:
    for verb in (
        follower.optim_step(AdamParams(lr=1.0)),
        follower.save(tmp_path, optimizer=False),
        follower.load(tmp_path, optimizer=True),
    ):
        with pytest.raises(EngineError, match="trained elsewhere"):
            await verb


def test_the_file_holds_copies(tmp_path: Path) -> None:
    tensor = torch.ones(2, 3, dtype=torch.bfloat16)
    assert write_weights(tmp_path / "w", [("x", tensor)], version=4) == 12
    tensor.zero_()
    tensors, version = read_weights(tmp_path / "w")
    assert version == 4 and torch.equal(tensors["x"], torch.ones(2, 3, dtype=torch.bfloat16))
