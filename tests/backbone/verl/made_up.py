"""Episodes with samples that were never played."""

from __future__ import annotations

import numpy as np

from astuner.types import Episode, Sample, Task, token_ids
from tests.spans import spans_of

PROMPT = 3
SHAPES = [[4, 2, 3], [5], [1, 7], [6]]
"""Trained tokens of each timeline of each episode."""


def episodes_with_advantages() -> list[tuple[Episode, list[Sample]]]:
    """Two groups of two; token t of episode e has the advantage e + t / 10 - 1."""
    made: list[tuple[Episode, list[Sample]]] = []
    for number, timelines in enumerate(SHAPES):
        samples = [_sample(number, n, size) for n, size in enumerate(timelines)]
        made.append((_episode(number, samples), samples))
    return made


def _sample(episode: int, number: int, size: int) -> Sample:
    """A prompt, then `size` trained tokens with an untrained one among them (if two or more)."""
    mask = np.array([False] * PROMPT + [True] + [False] * (size > 1) + [True] * (size - 1))
    count = len(mask)
    advantages = np.where(mask, episode - 1 + np.arange(count) / 10, 0.0)
    return Sample(
        sample_id=f"e{episode}/{number}",
        episode_id=f"e{episode}",
        group_id=f"g{episode // 2}",
        task_id="t",
        agent_name="default",
        target_tag="default",
        token_ids=token_ids(range(100, 100 + count)),
        loss_mask=mask,
        logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
        spans=spans_of(np.where(mask, number, -1), np.where(mask, 2 + number, -1)),
        reward=1.0,
        advantages=advantages.astype(np.float32),
    )


def _episode(number: int, samples: list[Sample]) -> Episode:
    return Episode(
        episode_id=f"e{number}",
        group_id=f"g{number // 2}",
        task=Task(),
        repeat_index=number % 2,
        split="train",
        calls=(),
        samples=tuple(samples),
        output=None,
        reward=0.5,
        turn_rewards=None,
        is_success=None,
        failure=None,
        started_at=0.0,
        ended_at=1.0,
    )
