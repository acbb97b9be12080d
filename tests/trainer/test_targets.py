"""Several targets in one batch: each adapter is trained as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from astuner.algorithm.advantages import dr_grpo
from astuner.backbone.report import eval_result
from astuner.trainer.batch import make_batch, with_checked_rewards
from astuner.trainer.metrics import batch_metrics, episode_metrics
from astuner.types import Episode, Failure, FailureKind, Group, Sample, Task

from . import toys

BOTH = frozenset({"wolf", "villager"})


def episode(name: str, group: str, rewards: Mapping[str, tuple[float, ...]]) -> Episode:
    """Each target says two tokens, in the order of `rewards`."""
    calls = [
        replace(toys.call(name, reply=(3, 4)), target_tag=tag, call_id=f"{name}/{n}")
        for n, tag in enumerate(rewards)
    ]
    made = toys.episode(name, group, 0.0, calls=calls)
    samples = [
        replace(s, target_tag=c.target_tag, spans=s.spans + np.array([0, 0, n, 0], np.int32))
        for n, (s, c) in enumerate(zip(made.samples, calls, strict=True))
    ]
    return replace(made, samples=tuple(samples), target_rewards=dict(rewards))


def group(name: str, wolf: list[float], villager: list[float]) -> Group:
    episodes = [
        episode(f"{name}/{i}", name, {"wolf": (w,), "villager": (v,)})
        for i, (w, v) in enumerate(zip(wolf, villager, strict=True))
    ]
    return Group(name, Task(task_id="t"), tuple(episodes), born_version=0)


def told(samples: tuple[Sample, ...]) -> list[tuple[str, float, float]]:
    """Target, advantage and weight of each sample's last token."""
    return [(s.target_tag, float(s.advantages[-1]), float(s.weights[-1])) for s in samples]


def test_an_adapter_of_ones_own_has_weights_of_ones_own() -> None:
    settings = toys.settings(estimator=dr_grpo, own_targets=frozenset({"wolf"}))
    [batch] = make_batch([group("g", [1, 0], [0, 4])], settings).mini_batches
    # two episodes of two tokens each, for each adapter: 1 / (2 * 2)
    assert told(batch) == [
        ("wolf", 0.5, 0.25), ("villager", -2.0, 0.25),
        ("wolf", -0.5, 0.25), ("villager", 2.0, 0.25),
    ]  # fmt: skip


def test_targets_of_one_adapter_share_the_weight_of_their_episode() -> None:
    [batch] = make_batch(
        [group("g", [1, 0], [0, 4])], toys.settings(estimator=dr_grpo)
    ).mini_batches
    assert {weight for _, _, weight in told(batch)} == {1 / 8}  # two episodes of four tokens


def test_a_group_that_teaches_one_target_only_trains_that_one() -> None:
    settings = toys.settings(estimator=dr_grpo, own_targets=BOTH)
    batch = make_batch([group("g", [1, 0], [5, 5]), group("h", [0, 2], [0, 2])], settings)
    [trained] = batch.mini_batches
    # the wolf's batch: four episodes, all taught; the villager's: two taught, two passive
    assert told(trained) == [
        ("wolf", 0.5, 0.125), ("wolf", -0.5, 0.125),
        ("wolf", -1.0, 0.125), ("villager", -1.0, 0.125),
        ("wolf", 1.0, 0.125), ("villager", 1.0, 0.125),
    ]  # fmt: skip
    assert batch.masked_tokens == {"context": 8, "no_variance": 4}
    assert batch.tokens_trained == 12


def test_what_teaches_nobody_is_left_out_as_ever() -> None:
    settings = toys.settings(estimator=dr_grpo, own_targets=BOTH)
    batch = make_batch([group("g", [1, 1], [5, 5])], settings)
    assert batch.mini_batches == ()
    assert batch.skipped_groups == {"no_variance": 1}
    assert batch.masked_tokens == {"no_variance": 8}


def test_rewards_by_target_that_cannot_be_used_fail_their_episode() -> None:
    bad = episode("g/0", "g", {"wolf": (math.nan,), "villager": (0.0,)})
    long = episode("g/1", "g", {"wolf": (1.0, 2.0), "villager": (0.0,)})
    checked = with_checked_rewards(Group("g", Task(), (bad, long), 0))
    messages = [e.failure.message for e in checked.episodes if e.failure]
    assert messages[0].startswith("The reward of target 'wolf' is not finite")
    assert messages[1].startswith("A list of 2 rewards for the 1 LLM calls of target 'wolf'")


def test_metrics_are_by_target_where_there_are_several() -> None:
    settings = toys.settings(estimator=dr_grpo, own_targets=BOTH)
    batch = make_batch([group("g", [1, 0], [5, 5])], settings)
    metrics = episode_metrics(batch.episodes) | batch_metrics(batch)
    assert (metrics["reward/wolf/mean"], metrics["reward/villager/mean"]) == (0.5, 5.0)
    assert metrics["reward/wolf/max"] == 1.0
    assert metrics["tokens/wolf/sampled"] == metrics["tokens/villager/sampled"] == 4.0
    assert metrics["tokens/wolf/trained"] == 4.0
    assert "tokens/villager/trained" not in metrics
    assert metrics["reply/wolf/tokens_mean"] == 2.0
    alone = episode_metrics(toys.group("g", [1.0, 0.0]).episodes)
    assert not [name for name in alone if name.count("/") > 1]


def test_a_validation_tells_the_score_of_each_target() -> None:
    episodes = group("g", [1, 0], [5, 5]).episodes
    result = eval_result([replace(e, reward=0.5) for e in episodes])
    assert result.score == 0.5
    assert result.metrics["reward/wolf"] == 0.5
    assert result.metrics["reward/villager"] == 5.0


def test_a_failed_episode_counts_as_nothing_in_every_score() -> None:
    first, *others = (replace(e, reward=3.0) for e in group("g", [1, 1], [5, 5]).episodes)
    lost = replace(first, failure=Failure(FailureKind.ENVIRONMENT, "gone"))
    result = eval_result([lost, *others])
    assert (result.score, result.metrics["reward"], result.metrics["failed"]) == (1.5, 1.5, 1.0)
    assert (result.metrics["reward/wolf"], result.metrics["reward/villager"]) == (0.5, 2.5)


def test_an_old_opponent_does_not_make_a_group_stale() -> None:
    old = group("g", [1], [0]).episodes[0]
    calls = tuple(
        replace(c, weight_versions=np.full(2, 7 if c.target_tag == "wolf" else 0, np.int32))
        for c in old.calls
    )
    samples = tuple(
        replace(s, loss_mask=s.loss_mask & (s.target_tag == "wolf")) for s in old.samples
    )
    played = replace(old, calls=calls, samples=samples)
    assert Group("g", Task(), (played,), born_version=9).oldest_version == 7
    both = replace(old, calls=calls)
    assert Group("g", Task(), (both,), born_version=9).oldest_version == 0


@pytest.mark.parametrize("own", [frozenset(), BOTH])
def test_the_reward_of_one_target_alone_is_as_ever(own: frozenset[str]) -> None:
    plain = toys.group("g", [1.0, 0.0])
    settings = toys.settings(own_targets=own)
    [batch] = make_batch([plain], settings).mini_batches
    assert [float(s.advantages[1]) for s in batch] == pytest.approx([0.70710, -0.70710], abs=1e-5)
