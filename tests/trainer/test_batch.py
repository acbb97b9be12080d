"""Which groups are trained, with what weights, and where every sampled token went."""

from __future__ import annotations

import pytest

from astuner.algorithm.advantages import dr_grpo, reinforce, reinforce_plus_plus
from astuner.trainer.batch import account, make_batch, num_teaching, sampled_tokens
from astuner.types import Failure, FailureKind, Group, Task

from .toys import call, episode, group, settings

CENTRED = settings(estimator=dr_grpo)


def test_advantages_and_weights_are_on_the_samples() -> None:
    batch = make_batch([group("a", [1.0, 0.0])], CENTRED)
    [[first, second]] = batch.mini_batches
    assert list(first.advantages) == [0.0, 0.5]
    assert list(second.advantages) == [0.0, -0.5]
    assert list(first.weights) == [0.0, 0.5]
    assert batch.tokens_trained == 2
    assert batch.masked_tokens == {"context": 2}


def test_every_reason_to_skip_is_counted() -> None:
    masked = [episode(f"m/{i}", "m", float(i), trained=False) for i in range(2)]
    groups = [
        group("good", [1.0, 0.0]),
        group("same", [0.1, 0.1, 0.1]),
        group("alone", [1.0, None]),
        group("broken", [None, None]),
        Group("m", Task(), tuple(masked), 0),
    ]
    batch = make_batch(groups, CENTRED)
    assert [g.group_id for g in batch.trained] == ["good"]
    assert batch.skipped_groups == {
        "no_variance": 1,
        "single_survivor": 1,
        "failed": 1,
        "no_trained_tokens": 1,
    }
    assert batch.masked_tokens == {
        "context": 2,  # the prompts of the good group
        "no_variance": 3,
        "single_survivor": 1,
        "failed": 1 + 2,
        "no_trained_tokens": 2,
    }
    totals = account(batch, {}, seconds=2.0)
    assert totals.tokens_sampled == 11
    assert totals.tokens_trained == 2
    # what was sampled is trained or has a reason
    assert 2 + sum(batch.masked_tokens.values()) - 2 == totals.tokens_sampled
    assert (totals.episodes, totals.episodes_failed) == (11, 3)


def test_the_survivors_are_the_group() -> None:
    batch = make_batch([group("a", [1.0, None, 0.0, 0.5])], CENTRED)
    assert [float(s.advantages[1]) for s in batch.samples] == [0.5, -0.5, 0.0]


def test_leaving_out_a_group_without_variance_changes_no_weight() -> None:
    batch = make_batch([group("a", [1.0, 0.0]), group("b", [0.0, 0.0])], CENTRED)
    assert [float(s.weights[1]) for s in batch.samples] == [0.25, 0.25]


def test_with_dynamic_sampling_only_what_is_trained_counts() -> None:
    groups = [group("a", [1.0, 0.0]), group("b", [0.0, 0.0]), group("c", [0.0, 1.0])]
    dynamic = settings(estimator=dr_grpo, dynamic_sampling=True)
    batch = make_batch(groups, dynamic, size=1)
    assert [g.group_id for g in batch.trained] == ["a"]
    assert [float(s.weights[1]) for s in batch.samples] == [0.5, 0.5]
    assert batch.skipped_groups == {"no_variance": 1, "surplus": 1}
    assert num_teaching(groups, dynamic) == 2


def test_an_estimator_without_groups_learns_from_equal_and_single_ones() -> None:
    groups = [group("a", [1.0, 1.0]), group("b", [0.0])]
    assert len(make_batch(groups, settings(estimator=reinforce_plus_plus)).trained) == 2
    assert [g.group_id for g in make_batch(groups, settings(estimator=reinforce)).trained] == ["a"]


def test_mini_batches_are_whole_groups_each_weighed_on_its_own() -> None:
    groups = [group(n, [1.0, 0.0]) for n in "abc"]
    batch = make_batch(groups, settings(estimator=dr_grpo, mini_batch_num=2))
    assert [{s.group_id for s in mini} for mini in batch.mini_batches] == [{"a", "c"}, {"b"}]
    assert [sum(float(s.weights.sum()) for s in m) for m in batch.mini_batches] == [1.0, 1.0]


def test_no_more_mini_batches_than_groups() -> None:
    batch = make_batch([group("a", [1.0, 0.0])], settings(estimator=dr_grpo, mini_batch_num=4))
    assert len(batch.mini_batches) == 1


@pytest.mark.parametrize(
    ("reward", "turn_rewards", "message"),
    [
        (None, None, "has no reward"),
        (float("nan"), None, "not finite: nan"),
        (1.0, (float("inf"),), "not finite"),
        (1.0, (0.5, 0.5), "A list of 2 rewards for 1 LLM calls"),
    ],
)
def test_a_reward_that_cannot_be_used_fails_its_episode_alone(
    reward: float | None, turn_rewards: tuple[float, ...] | None, message: str
) -> None:
    bad = episode("x", "g", reward, turn_rewards=turn_rewards)
    good = [episode("y", "g", 1.0), episode("z", "g", 0.0)]
    batch = make_batch([Group("g", Task(), (bad, *good), 0)], CENTRED)
    [failed] = [e for e in batch.episodes if not e.ok]
    assert failed.failure is not None and message in failed.failure.message
    assert failed.failure.kind == FailureKind.REWARD
    assert [s.episode_id for s in batch.samples] == ["y", "z"]
    assert batch.masked_tokens["failed"] == 1


def test_turn_rewards_give_credit_by_turn() -> None:
    turns = episode("x", "g", 3.0, turn_rewards=(3.0,))
    batch = make_batch([Group("g", Task(), (turns, episode("y", "g", 1.0)), 0)], CENTRED)
    assert [float(s.advantages[1]) for s in batch.samples] == [1.0, -1.0]


def test_samples_without_a_trained_token_are_not_sent() -> None:
    half = Group("g", Task(), (episode("x", "g", 1.0), episode("y", "g", 0.0, trained=False)), 0)
    batch = make_batch([half], CENTRED)
    assert [s.episode_id for s in batch.samples] == ["x"]
    assert batch.masked_tokens == {"context": 2, "too_long": 1}


def test_no_groups_at_all() -> None:
    batch = make_batch([], CENTRED)
    assert (batch.mini_batches, batch.tokens_trained) == ((), 0)


def test_dropped_tokens_of_the_source_are_accounted_for() -> None:
    batch = make_batch([group("a", [1.0, 0.0])], CENTRED)
    totals = account(batch, {"tokens_masked/too_stale": 7.0, "rollout/retries": 2.0}, 1.0)
    assert totals.tokens_sampled == 9
    assert totals.tokens_masked_by_reason == {"context": 2, "too_stale": 7}


def test_sampled_tokens_counts_every_call() -> None:
    e = episode("x", "g", 1.0, calls=[call("x", [1, 2, 3]), call("x", [4])])
    assert sampled_tokens(e) == 4
    failed = episode("x", "g", None, failure=Failure(FailureKind.TIMEOUT, "late"))
    assert sampled_tokens(failed) == 1
