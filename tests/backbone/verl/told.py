"""What verl is told of a configuration, for the tests of the translation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from astuner.backbone.spawned.choices import Device
from astuner.backbone.verl.translate import to_verl
from astuner.config.load import load_config
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError

RUN_DIR = Path("/runs/x")
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MODEL, REF = "actor_rollout_ref.model", "actor_rollout_ref.ref"
OPTIM, LOSS = f"{ACTOR}.optim", "trainer_common.algorithm"
ASYNC = ("rollout.mode=async", "rollout.max_staleness=2")


def config(*overrides: str) -> AstunerConfig:
    return load_config(None, overrides, backbone="verl").config


def told(*overrides: str, device: Device = "cuda", **more: Any) -> dict[str, Any]:
    return to_verl(config(*overrides), run_dir=RUN_DIR, device=device, **more)


def refusal(*overrides: str, device: Device = "cuda") -> str:
    with pytest.raises(ConfigError) as caught:
        told(*overrides, device=device)
    return str(caught.value)
