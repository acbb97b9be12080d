"""Several adapters as one policy: each as if alone, and old weights for those who play them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.protocol import (
    AdamParams,
    Completion,
    Engine,
    LoraSpec,
    LossSpec,
    Policy,
    SamplingParams,
    generate,
)
from astuner.engine.team import SHARED, Member, Seat, Team
from astuner.errors import CheckpointError, EngineError
from astuner.types import Sample

from .embedded.test_host import SETTINGS, open_host
from .embedded.test_learner import group
from .embedded.tiny import prompt
from .embedded.tiny_training import save_tiny

pytestmark = pytest.mark.timeout(60)
LORA, SMALL = LoraSpec(rank=4, alpha=8), LoraSpec(rank=2, alpha=8)
PG, STEP = LossSpec("pg"), AdamParams(lr=0.03)
PARAMS = SamplingParams(max_tokens=8, seed=5)
TWO = (Member("wolf", LORA, seed=1), Member("villager", SMALL, seed=2, rate=0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


async def opened(
    folder: Path, members: Sequence[Member] = TWO, seats: Mapping[str, Seat] | None = None
) -> Team:
    return await Team.open(open_host(folder), members, seats or {})


def alone(folder: Path, member: Member) -> EmbeddedModel:
    return EmbeddedModel.open(
        folder, dtype="float32", lora=member.lora, seed=member.seed, **SETTINGS
    )


def of(tag: str, samples: Sequence[Sample]) -> list[Sample]:
    return [replace(s, target_tag=tag) for s in samples]


def mixed() -> list[Sample]:
    """Eight samples, in turns of the wolf and the villager."""
    tags = ("wolf", "villager") * 4
    return [replace(s, target_tag=tag) for s, tag in zip(group(), tags, strict=True)]


async def step(policy: Policy, samples: Sequence[Sample], adam: AdamParams = STEP) -> int:
    await policy.forward_backward(samples, PG)
    await policy.optim_step(adam)
    return await policy.publish()


async def draw(engine: Engine) -> Completion:
    return await generate(engine, prompt(0, 30), PARAMS)


def same(a: Completion, b: Completion) -> bool:
    return a.token_ids.tolist() == b.token_ids.tolist() and np.array_equal(a.logprobs, b.logprobs)


# ---------------------------------------------------------------- training


async def test_it_is_an_engine_and_a_policy(folder: Path) -> None:
    team = await opened(folder)
    assert isinstance(team, Engine)
    assert isinstance(team.players["wolf"], Engine)
    team.close()


async def test_a_team_of_one_is_bitwise_the_embedded_model(folder: Path) -> None:
    member = Member(SHARED, LORA, seed=7)
    team, model = await opened(folder, [member]), alone(folder, member)
    for _ in range(2):
        mine = await team.forward_backward(mixed(), PG)
        theirs = await model.forward_backward(mixed(), PG)
        assert (mine.loss, mine.metrics) == (theirs.loss, theirs.metrics)
        assert all(map(np.array_equal, mine.logprobs, theirs.logprobs))
        assert await team.optim_step(STEP) == await model.optim_step(STEP)
        assert await team.publish() == await model.publish()
    mine, theirs = await draw(team), await draw(model)
    assert same(mine, theirs)
    assert mine.weight_versions.tolist() == theirs.weight_versions.tolist() == [2] * 8
    team.close()
    model.close()


async def test_each_member_learns_from_its_own_samples_at_its_own_rate(folder: Path) -> None:
    team = await opened(folder)
    for _ in range(2):
        assert await step(team, mixed()) in (1, 2)
    for member in TWO:
        model = alone(folder, member)
        own = [s for s in mixed() if s.target_tag == member.tag]
        for _ in range(2):
            await step(model, own, replace(STEP, lr=STEP.lr * member.rate))
        assert same(await draw(model), await draw(team.players[member.tag]))
        theirs = await model.forward(own)
        assert all(map(np.array_equal, await team.forward(own), theirs))
        model.close()
    team.close()


async def test_who_has_no_samples_does_not_move(folder: Path) -> None:
    team = await opened(folder)
    before = await draw(team.players["villager"])
    told = await team.forward_backward(of("wolf", group()), PG)
    assert told.metrics["wolf/trained_tokens"] == told.metrics["trained_tokens"]
    moved = await team.optim_step(STEP)
    assert sorted(moved) == ["grad_norm", "lr", "skipped", "wolf/grad_norm", "wolf/lr"]
    assert await team.publish() == 1
    after = await draw(team.players["villager"])
    assert same(before, after)
    assert after.weight_versions.tolist() == [1] * 8  # the newest there is
    assert not same(before, await draw(team.players["wolf"]))
    assert (await team.optim_step(STEP))["skipped"] == 1.0
    team.close()


async def test_logprobs_come_back_in_the_order_of_the_samples(folder: Path) -> None:
    team = await opened(folder)
    await step(team, mixed())
    apart = {tag: await team.forward(of(tag, group())) for tag in ("wolf", "villager")}
    together = await team.forward(mixed())
    trained = await team.forward_backward(mixed(), PG)
    for i, sample in enumerate(mixed()):
        # packed with other samples, so equal up to rounding
        assert np.allclose(together[i], apart[sample.target_tag][i], atol=1e-4)
        assert np.array_equal(trained.logprobs[i], together[i])
    assert trained.metrics["trained_tokens"] == sum(s.num_trained for s in mixed())
    assert trained.metrics["villager/trained_tokens"] == sum(
        s.num_trained for s in mixed() if s.target_tag == "villager"
    )
    assert trained.loss == trained.metrics["wolf/loss"] + trained.metrics["villager/loss"]
    team.close()


async def test_a_sample_that_nobody_would_learn_from_is_refused(folder: Path) -> None:
    team = await opened(folder)
    with pytest.raises(EngineError, match=r"of target 'seer'.*there are \['villager', 'wolf'\]"):
        await team.forward_backward(of("seer", group()), PG)
    team.close()


# ---------------------------------------------------------------- who plays


async def test_a_frozen_seat_is_the_base_and_so_is_the_team_without_a_shared_adapter(
    folder: Path,
) -> None:
    team = await opened(folder, seats={"user": Seat(None)})
    before = await draw(team.players["user"])
    await step(team, mixed())
    after = await draw(team.players["user"])
    assert same(before, after)
    assert after.weight_versions.tolist() == [0] * 8
    assert same(after, await draw(team))
    team.close()


async def test_an_opponent_plays_the_weights_of_some_versions_ago(folder: Path) -> None:
    seats = {"last": Seat("wolf", 1), "older": Seat("wolf", 3), "new": Seat("wolf", 0)}
    team = await opened(folder, seats=seats)
    history = [await draw(team.players["wolf"])]
    for version in range(1, 6):
        await step(team, of("wolf", group()))
        history.append(await draw(team.players["wolf"]))
        for tag, back in (("last", 1), ("older", 3), ("new", 0)):
            played = await draw(team.players[tag])
            assert same(played, history[max(0, version - back)])
            assert set(played.weight_versions.tolist()) == {max(0, version - back)}
        # versions 5-3..5 of the wolf, and the villager's one
        assert team.stats().snapshots == min(version + 1, 4) + 1
    assert len({tuple(c.logprobs.tolist()) for c in history}) == 6
    team.close()


async def test_a_stream_ends_under_the_weights_it_began_with(folder: Path) -> None:
    team = await opened(folder)
    wolf = team.players["wolf"]
    whole = await draw(wolf)
    ids: list[int] = []
    async with aclosing(wolf.stream(prompt(0, 30), PARAMS)) as chunks:
        async for chunk in chunks:
            if not ids:
                await step(team, of("wolf", group()))
                await step(team, of("wolf", group()))
                assert team.stats().snapshots == 3  # this one, the newest, the villager's
            ids += chunk.token_ids
            assert chunk.weight_version == 0
    assert ids == whole.token_ids.tolist()
    await team.publish()
    assert team.stats().snapshots == 2
    team.close()


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("at", [1, 3])
async def test_a_resume_goes_on_bitwise_and_brings_the_opponents_back(
    folder: Path, tmp_path: Path, at: int
) -> None:
    seats = {"old": Seat("wolf", 2), "ancient": Seat(SHARED, 9)}
    members = [Member(SHARED, LORA, seed=4), *TWO]
    samples = [*mixed(), *of("seer", group()[:2])]
    first = await opened(folder, members, seats)
    for _ in range(at):
        await step(first, samples)
    await first.save(tmp_path / "saved", optimizer=True)
    second = await opened(folder, members, seats)
    await step(second, of("wolf", group()))  # something to be forgotten
    assert await second.load(tmp_path / "saved", optimizer=True) == at
    for _ in range(3):
        for tag in ("wolf", "villager", "old", "ancient"):
            a, b = await draw(first.players[tag]), await draw(second.players[tag])
            assert same(a, b)
            assert a.weight_versions.tolist() == b.weight_versions.tolist()
        assert same(await draw(first), await draw(second))
        assert await step(first, samples) == await step(second, samples)
    assert first.stats().snapshots == second.stats().snapshots
    names = sorted(str(p.relative_to(tmp_path / "saved")) for p in (tmp_path / "saved").rglob("*"))
    assert "adapter_model.safetensors" in names
    assert "targets/villager/optimizer.safetensors" in names
    assert f"past/wolf/{max(0, at - 2):06d}/adapter_model.safetensors" in names
    assert [n for n in names if n.startswith("past/villager")] == []
    first.close()
    second.close()


async def test_a_folder_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    team = await opened(folder)
    with pytest.raises(CheckpointError, match="was not written by a run with"):
        await team.load(tmp_path, optimizer=True)
    team.close()
