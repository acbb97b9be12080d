"""GRPO on the quickstart's sums with the real model, by nothing but the official SDK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from astuner.engine.model_source import resolve_model
from tests.service.sdk.conftest import KEYS, Sdk, keys
from tests.service.server import tiny_server

STEPS = 16


def sums(number: int) -> list[tuple[str, str]]:
    """As in configs/quickstart.yaml: question and answer."""
    import reasoning_gym

    shape: dict[str, Any] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    rows = reasoning_gym.create_dataset("chain_sum", size=number, seed=0, **shape)
    return [(f"{r['question']}\nReply with just the number.", str(r["answer"])) for r in rows]


@pytest.mark.parametrize("sdk", ["0.38"], indirect=True)  # test_sdk.py has the loop with both
@pytest.mark.slow
@pytest.mark.tinker
@pytest.mark.timeout(1800)
def test_grpo_on_sums_raises_the_reward(sdk: Sdk, tmp_path: Path) -> None:
    folder = resolve_model("smollm2-135m")
    with tiny_server(folder, tmp_path, "model.dtype=auto", *keys()) as server:
        given = {"tasks": sums(72), "steps": STEPS, "batch": 8, "repeat": 16}
        seen = sdk.do("arithmetic", server.url, seconds=1700, key=KEYS["alice"], **given)
    rewards = seen["rewards"]
    print("rewards", [round(r, 3) for r in rewards])
    assert len(rewards) == STEPS
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.1
