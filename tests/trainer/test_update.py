"""Mini-batches in order, and which policy their ratios refer to."""

from __future__ import annotations

import numpy as np
import pytest

from astuner.algorithm.advantages import dr_grpo
from astuner.engine.protocol import AdamParams, LossSpec
from astuner.trainer.batch import make_batch
from astuner.trainer.update import update_policy

from .toys import ToyPolicy, group, settings

LOSS = LossSpec("ppo")


def nothing() -> None:
    """Where the loop notes that the weights change."""


async def test_one_mini_batch_needs_no_proximal_logprobs() -> None:
    policy = ToyPolicy()
    [mini] = make_batch([group("a", [1.0, 0.0])], settings(estimator=dr_grpo)).mini_batches
    update = await update_policy(policy, [mini], LOSS, AdamParams(0.1), before_step=nothing)
    assert policy.verbs == ["forward_backward", "optim_step"]
    assert policy.seen[0][0].proximal_logprobs is None
    # uniform over five tokens; both tokens are 3 with advantages that cancel
    assert update.logprobs[0].tolist() == pytest.approx([0.0, -np.log(5)])
    assert update.loss == pytest.approx(0.0)
    assert update.lr == 0.1


async def test_several_mini_batches_refer_to_the_start_of_the_step() -> None:
    policy = ToyPolicy(logits=np.array([0.0, 0.0, 0.0, 1.0, 0.0]))
    batch = make_batch(
        [group("a", [1.0, 0.0, 0.0]), group("b", [1.0, 0.0])],
        settings(estimator=dr_grpo, mini_batch_num=2),
    )
    calls: list[str] = []
    update = await update_policy(
        policy, batch.mini_batches, LOSS, AdamParams(0.1), before_step=lambda: calls.append("step")
    )
    assert policy.verbs == ["forward"] + ["forward_backward", "optim_step"] * 2
    assert calls == ["step", "step"]
    start = 1 - np.log(4 + np.e)
    for s in [*policy.seen[0], *policy.seen[1]]:
        assert s.proximal_logprobs is not None
        assert s.proximal_logprobs.tolist() == pytest.approx([0.0, start])
    assert len(update.logprobs) == 5
    assert update.metrics == {"ratio": 1.0, "packed_tokens": 10.0, "sample_tokens": 10.0}
