"""docs/environments.md, the envs/ folders and the frozen lake do what they say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from astuner.cli import main
from astuner.env.protocol import TextEnv

from .artefacts import ROOT, blocks, tiny

PAGE = ROOT / "docs" / "environments.md"
LAKE = ROOT / "tutorial" / "example_frozenlake" / "frozenlake.yaml"
pytest.importorskip("gymnasium", reason="comes with the extra test")


def test_the_world_of_the_page() -> None:
    (source,) = [block for block in blocks(PAGE, "python") if "class Guess" in block]
    names: dict[str, Any] = {}
    exec(source, names)
    world: TextEnv = names["Guess"]("t", {})
    assert world.reset(seed=6)[0] == "Guess a number from 1 to 9."
    assert world.step("is it 3?")[:3] == ("Wrong.", 0.0, False)
    assert world.step("7!")[:3] == ("Right.", 1.0, True)


@pytest.mark.timeout(60)
def test_the_serving_command() -> None:
    (shown, _) = "".join(blocks(PAGE, "sh")).splitlines()
    arguments = shlex.split(shown.replace("8080", "0"))[1:]
    command = [sys.executable, "-m", "astuner.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        body = {"env_type": "toy_text", "task_id": "t", "params": {"map_name": "4x4"}}
        made = httpx.post(f"{url}/create", json=body, timeout=30).json()
        assert made["data"]["state"][0]["content"].startswith("You are at row 0, column 0")
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("folder", sorted(ROOT.glob("envs/*/environment.py")), ids=str)
def test_every_environment_folder_is_whole(folder: Path) -> None:
    here = folder.parent
    assert (here / "README.md").is_file()
    assert list(here.glob("test_*.py"))
    pins = (here / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", pin) for pin in pins)
    assert f"astuner env serve {here.name}" in (here / "README.md").read_text()


@pytest.mark.parametrize("own_process", [False, True])
def test_frozen_lake_trains(own_process: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    overrides = tiny(tiny_model_dir, steps=2 - own_process)
    if own_process:
        overrides += ["env.type=", "env.service=toy_text"]
    assert main(["--conf", str(LAKE), "--exp-dir", str(runs), *overrides]) == 0
    summary = json.loads((runs / "frozenlake" / "summary.json").read_text())
    assert summary["episodes_failed"] == 0
    assert summary["episodes"] == 8 - 4 * own_process
    rows = [json.loads(r) for r in (runs / "frozenlake" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("env/steps", 0) for row in rows) >= 4
    assert not any(key.startswith("env/failed") for row in rows for key in row)
