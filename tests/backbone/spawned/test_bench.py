"""The limits of a run, shared by the processes that play its episodes."""

from __future__ import annotations

import pytest

from astuner.backbone.assembly import rollout_settings
from astuner.backbone.spawned.bench import share, with_fewer_environments
from astuner.config.schema import AstunerConfig


@pytest.mark.parametrize(
    ("processes", "workers", "failures"), [(1, 100, 8), (2, 50, 4), (8, 13, 2), (100, 1, 2)]
)
def test_a_process_has_its_share_of_the_limits(processes: int, workers: int, failures: int) -> None:
    config = AstunerConfig()
    config.data.train_batch_size, config.rollout.max_env_worker = 64, 100
    settings = share(rollout_settings(config), processes)
    assert (settings.max_env_worker, settings.fail_fast_groups) == (workers, failures)
    assert settings.num_repeat == config.rollout.num_repeat


def test_a_run_of_one_group_fails_with_it() -> None:
    config = AstunerConfig()
    config.data.train_batch_size = 1
    assert share(rollout_settings(config), 8).fail_fast_groups == 1


def test_a_process_has_its_share_of_the_environments() -> None:
    config = AstunerConfig()
    config.env.max_instances = 100
    assert with_fewer_environments(config, 8).env.max_instances == 13
    assert config.env.max_instances == 100
