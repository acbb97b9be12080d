"""The numbers of a step, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from astuner.algorithm.advantages import dr_grpo
from astuner.trainer.batch import make_batch
from astuner.trainer.metrics import batch_metrics, episode_metrics, staleness, update_metrics
from astuner.trainer.update import Update
from astuner.types import Failure, FailureKind

from .toys import call, episode, group, sample, settings


def test_episode_metrics() -> None:
    crash = Failure(FailureKind.TIMEOUT, "late")
    episodes = [
        episode("a", "g", 1.0, is_success=True, log_metrics={"tools": 2.0, "rare": 5.0}),
        episode(
            "b",
            "g",
            0.0,
            calls=[
                call("b", [1, 2, 3], finish="length"),
                replace(call("b", [1]), new_timeline_reason="edited_history"),
            ],
            is_success=False,
            log_metrics={"tools": 4.0},
        ),
        episode("c", "g", None, failure=crash, log_metrics={"tools": 100.0}),
    ]
    metrics = episode_metrics(episodes)
    assert {k: v for k, v in metrics.items() if k.startswith("reward/")} == {
        "reward/mean": 0.5,
        "reward/std": 0.5,
        "reward/min": 0.0,
        "reward/max": 1.0,
        "reward/success_rate": 0.5,
    }
    assert metrics["episodes/total"] == 3
    assert metrics["episodes/failed"] == metrics["episodes/failed_timeout"] == 1
    assert metrics["timelines/mean"] == 1.5
    assert metrics["timelines/new_edited_history"] == 1
    assert metrics["reply/tokens_mean"] == pytest.approx(5 / 3)
    assert metrics["reply/tokens_max"] == 3
    assert metrics["reply/truncated_fraction"] == pytest.approx(1 / 3)
    assert (metrics["user/tools"], metrics["user/rare"]) == (3.0, 5.0)


def test_nothing_usable_has_no_mean_reward() -> None:
    crash = Failure(FailureKind.ENGINE, "down")
    metrics = episode_metrics([episode("a", "g", None, calls=[], failure=crash)])
    assert "reward/mean" not in metrics
    assert metrics["episodes/failed_engine"] == 1


def test_batch_metrics() -> None:
    batch = make_batch([group("a", [1.0, 0.0]), group("b", [0, 0])], settings(estimator=dr_grpo))
    assert batch_metrics(batch) == {
        "groups/total": 2,
        "groups/trained": 1,
        "groups/skipped_no_variance": 1,
        "tokens/trained": 2,
        "timelines/trained": 2,
        "tokens_masked/context": 2,
        "tokens_masked/no_variance": 2,
    }


def test_sampler_kl_and_staleness() -> None:
    s = sample(call("a", [1, 2], logprob=-1.0, version=3), "g")
    trained = np.array([0.0, -1.0, -2.0], np.float32)
    update = Update(0.5, 2.0, 1e-3, (trained,), {"ratio": 1.0})
    metrics = update_metrics(update, [s], version=4)
    # log-ratios 0 and -1: k3 = 0 and e^-1 - 1 + 1
    assert metrics["policy/sampler_kl"] == pytest.approx(math.exp(-1) / 2)
    assert metrics["policy/sampler_gap_max"] == 1.0
    assert metrics["policy/entropy"] == 1.0
    assert metrics["policy/ratio"] == 1.0
    assert (metrics["policy/loss"], metrics["policy/grad_norm"]) == (0.5, 2.0)
    assert (metrics["staleness/mean"], metrics["staleness/lag_1"]) == (1.0, 1.0)


def test_an_entropy_that_the_policy_measured_is_taken() -> None:
    s = sample(call("a", [1]), "g")
    update = Update(0.5, 2.0, 1e-3, (np.zeros(2, np.float32),), {"entropy": 3.0})
    assert update_metrics(update, [s], version=0)["policy/entropy"] == 3.0


def test_staleness_histogram_counts_trained_tokens() -> None:
    samples = [
        sample(call("a", [1, 2, 3], version=5), "g"),
        sample(call("b", [1], version=2), "g"),
        sample(call("c", [1, 1], version=0), "g", trained=False),
    ]
    assert staleness(samples, version=5) == {
        "staleness/mean": 0.75,
        "staleness/max": 3.0,
        "staleness/lag_0": 0.75,
        "staleness/lag_3": 0.25,
    }
