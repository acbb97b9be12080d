"""docs/environments.md, the envs/ folders and the frozen lake do what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from omegaconf import OmegaConf

from astuner.cli import main
from astuner.env.protocol import TextEnv
from astuner.env.wire import STATUS
from astuner.errors import EnvError

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
@pytest.mark.parametrize(
    ("line", "body", "told"),
    [
        (0, {"env_type": "toy_text", "params": {"map_name": "4x4"}}, "You are at row 0, column 0"),
        (1, {"env_type": "my_pkg.worlds->Guess", "params": {"seed": 6}}, "Guess a number from"),
    ],
)
def test_the_serving_commands(line: int, body: dict[str, Any], told: str, tmp_path: Path) -> None:
    """As a shell reads them, beside the page's own world."""
    (source,) = [block for block in blocks(PAGE, "python") if "class Guess" in block]
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "worlds.py").write_text(source)
    shown = "".join(blocks(PAGE, "sh")).splitlines()[line]
    typed = shown.replace("8080", "0").replace(
        "astuner", f"exec {sys.executable} -m astuner.cli", 1
    )
    process = subprocess.Popen(["sh", "-c", typed], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        made = httpx.post(f"{url}/create", json={"task_id": "t", **body}, timeout=30).json()
        assert made["data"]["state"][0]["content"].startswith(told)
    finally:
        process.terminate()
        process.wait(30)


def test_every_cause_of_a_failure_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (yes|no) \|$", PAGE.read_text(), re.MULTILINE)
    assert {cause for cause, _ in rows} == set(STATUS)
    for cause, again in rows:
        assert EnvError("", cause=cause).retriable == (again == "yes")


@pytest.mark.parametrize("folder", sorted(ROOT.glob("envs/*/environment.py")), ids=str)
def test_every_environment_folder_is_whole(folder: Path) -> None:
    here = folder.parent
    assert (here / "README.md").is_file()
    assert list(here.glob("test_*.py"))
    pins = (here / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", pin) for pin in pins)
    assert f"astuner env serve {here.name}" in (here / "README.md").read_text()
    assert f"| [{here.name}]({here.name}/README.md) |" in (ROOT / "envs" / "README.md").read_text()
    assert "envs/README.md" in (ROOT / "README.md").read_text()
    assert "../envs/README.md" in PAGE.read_text()


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


@pytest.mark.parametrize(
    ("package", "world"),
    [
        ("bm25s", {"type": "webshop", "params": {"num_products": 60, "max_steps": 4}}),
        ("textarena", {"type": "textarena", "params": {"game": "GuessTheNumber-v0"}}),
        ("reasoning_gym", {"type": "reasoning_gym", "params": {"dataset": "chain_sum"}}),
    ],
)
def test_other_worlds_are_played_by_the_same_workflow(
    package: str, world: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    settings = OmegaConf.load(LAKE)
    settings.astuner.env = world
    OmegaConf.save(settings, tmp_path / "world.yaml")
    overrides = [*tiny(tiny_model_dir, steps=1), "data.max_prompt_length=900"]
    command = ["--conf", str(tmp_path / "world.yaml"), "--exp-dir", str(tmp_path / "runs")]
    assert main([*command, *overrides]) == 0
    run = tmp_path / "runs" / "frozenlake"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["episodes"], summary["episodes_failed"]) == (4, 0)
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("env/steps", 0) for row in rows) >= 4
