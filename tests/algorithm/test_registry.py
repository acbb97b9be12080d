"""Every name leads somewhere; an unknown one says what there is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from astuner.algorithm import ADVANTAGES, AGGREGATIONS, KLS, LOSSES, accepted, resolve
from astuner.errors import ConfigError, LoadingError


@pytest.mark.parametrize("registry", [ADVANTAGES, AGGREGATIONS, KLS, LOSSES])
def test_every_name_resolves(registry: dict[str, str]) -> None:
    for name in registry:
        assert callable(resolve(registry, name))


def test_an_unknown_name_lists_choices_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        resolve(ADVANTAGES, "gpro", "advantage estimator")
    assert "Unknown advantage estimator 'gpro'. Did you mean 'grpo'?" in str(error.value)
    assert "dr_grpo, grpo, reinforce, reinforce_plus_plus" in str(error.value)


def test_listing_the_names_imports_no_torch() -> None:
    code = "import sys, astuner.algorithm; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_accepted_keeps_only_what_a_function_reads() -> None:
    ppo = resolve(LOSSES, "ppo")
    assert accepted(ppo, {"clip_low": 0.1, "tis_cap": 2.0, "other": 1.0}) == {
        "clip_low": 0.1,
        "tis_cap": 2.0,
    }
    assert accepted(resolve(LOSSES, "policy_gradient"), {"clip_low": 0.1}) == {}


def test_a_function_of_ones_own_by_path() -> None:
    own = resolve(LOSSES, "astuner.algorithm.losses->gspo", "loss")
    assert own is resolve(LOSSES, "gspo", "loss")
    with pytest.raises(LoadingError):
        resolve(LOSSES, "astuner.algorithm.losses->nothing", "loss")
