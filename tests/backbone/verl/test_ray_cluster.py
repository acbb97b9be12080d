"""How verl starts Ray: what it may count on, and what its processes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from astuner.backbone.verl import reserved
from astuner.backbone.verl.ray_cluster import environment, init_arguments
from astuner.backbone.verl_cpu import VARIABLE

POOLS: dict[str, Any] = {"trainer.nnodes": 1, "trainer.n_gpus_per_node": 8}
ASYNC: dict[str, Any] = {
    "trainer.v1.trainer_mode": "separate_async",
    "actor_rollout_ref.rollout.nnodes": 1,
    "actor_rollout_ref.rollout.n_gpus_per_node": 4,
}


@pytest.mark.parametrize(("more", "least"), [({}, 16 + 24), (ASYNC, 16 + 36)])
def test_verl_finds_the_cpus_that_it_asks_for(
    more: dict[str, Any], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for them without a limit."""
    for cores, told in ((2, least), (200, 200)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert init_arguments(POOLS | more, "", "cuda", "/tmp/x")["num_cpus"] == told
    assert init_arguments(POOLS | more, "10.0.0.1:6379", "cuda", "/tmp/x") == {
        "address": "10.0.0.1:6379"
    }


def test_what_astuner_tells_its_processes_is_not_for_setting() -> None:
    section = "ray_kwargs.ray_init.runtime_env.env_vars"
    ours = ["ASTUNER_RUN_FOLDER", "VERL_USE_EXTERNAL_MODULES", "VERL_FILE_LOGGER_PATH", VARIABLE]
    assert set(ours) <= environment(Path("/runs/x"), "cpu").keys()
    told = [key for key, _ in reserved.reserved({f"{section}.{name}": "x" for name in ours})]
    assert told == [f"verl.{section}.{name}" for name in ours]
