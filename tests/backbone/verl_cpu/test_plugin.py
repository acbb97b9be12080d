"""verl's door to the CPU plugin: shut unless asked for, and never silently broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from astuner.backbone.verl_cpu import PLUGIN

pytestmark = [pytest.mark.verl, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[3]
LOOK = """
import json, os, sys
{before}
env, hooks = dict(os.environ), list(sys.meta_path)
import verl
changed = sorted(k for k in os.environ if os.environ[k] != env.get(k))
hooks = sorted(type(h).__module__ for h in sys.meta_path if h not in hooks)
ours = sorted(m for m in sys.modules if m.startswith("astuner"))
from verl.plugin.platform import PlatformRegistry, get_platform
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry
print(json.dumps(dict(
    changed=changed, hooks=hooks, ours=ours, platforms=sorted(PlatformRegistry._platforms),
    platform=get_platform().device_name, replicas=sorted(RolloutReplicaRegistry._registry),
    vllm=_ROLLOUT_REGISTRY["vllm", "async"], embedded=_ROLLOUT_REGISTRY.get(("embedded", "async")),
)))
"""


def installed(tmp_path: Path) -> str:
    """A folder to put on the path in which astuner is "installed" as pyproject.toml says."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plugins = project["entry-points"]["verl.plugins"]
    folder = tmp_path / "astuner-99.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: astuner\nVersion: 99\n")
    lines = [f"{name} = {module}" for name, module in plugins.items()]
    (folder / "entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines]) + "\n")
    return os.pathsep.join([str(tmp_path), str(ROOT)])


def start(path: str, before: str = "", **env: str) -> subprocess.Popen[str]:
    ours = ("ASTUNER", "VERL", "RAY", "GOMP", "KMP")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", LOOK.replace("{before}", before)],
        env={**inherited, "PYTHONPATH": path, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def seen(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


def test_it_acts_only_when_asked_for(tmp_path: Path) -> None:
    path = installed(tmp_path)
    shut = start(path, VERL_USE_EXTERNAL_PLUGINS="none")
    plain, asked = start(path), start(path, ASTUNER_VERL_CPU="1")
    without, baseline = seen(plain), seen(shut)
    assert baseline["platforms"] == ["amd", "huawei", "nvidia"]  # still none for the CPU
    assert baseline["replicas"] == ["sglang", "trtllm", "vllm"]
    assert baseline["ours"] == [] and baseline["embedded"] is None
    assert without == {**baseline, "ours": without["ours"]}
    package = "astuner.backbone.verl_cpu"
    assert without["ours"] == ["astuner", "astuner.backbone", package, f"{package}.plugin"]

    with_it = seen(asked)
    assert with_it["platform"] == "cpu"
    assert with_it["replicas"] == ["embedded", "sglang", "trtllm", "vllm"]
    assert with_it["embedded"] == f"{package}.rollout.EmbeddedAdapter"
    assert with_it["vllm"] == f"{package}.vllm_cpu.ServerAdapter"
    assert f"{package}.patches" in with_it["hooks"]
    assert f"{package}.vllm_cpu" not in with_it["ours"]  # only where vLLM is the engine


def test_it_may_be_named_instead_and_a_broken_one_ends_the_process() -> None:
    """verl itself would log a plugin's failure at debug level and go on."""
    named = {"ASTUNER_VERL_CPU": "1", "VERL_USE_EXTERNAL_MODULES": PLUGIN}
    working = start(str(ROOT), **named)
    broken = start(str(ROOT), "sys.modules['astuner.backbone.verl_cpu.platform'] = None", **named)
    assert seen(working)["platform"] == "cpu"
    _, errors = broken.communicate(timeout=100)
    assert broken.returncode == 1
    assert "ASTUNER_VERL_CPU=1, but verl could not be set up for the CPU" in errors
