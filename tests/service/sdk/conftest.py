"""Tests with the official SDKs run under `make test-service`, which makes their environments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.server import Server, tiny_server

ROOT = Path(__file__).parents[3]
SCENARIOS = Path(__file__).with_name("scenarios.py")
VERSIONS = ("0.38", "0.25")
KEYS = {"alice": "tml-key-of-alice", "bob": "tml-key-of-bob", "carol": "tml-key-of-carol"}
SECONDS = 100.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("ASTUNER_TEST_ENV") == "tinker":
        return
    for item in items:
        if item.get_closest_marker("tinker"):
            item.add_marker(
                pytest.mark.skip(reason="needs two versions of the SDK: make test-service")
            )


class Sdk:
    """One version of the SDK, which does scenarios in processes of its own."""

    def __init__(self, version: str) -> None:
        self.version = version
        command = [sys.executable, "scripts/install.py", "--env", f"tinker-{version}"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        self.python = Path(done.stdout.strip()) / "bin" / "python"

    def start(self, scenario: str, url: str, **given: Any) -> subprocess.Popen[str]:
        quiet = {"TINKER_LOG": "error", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        keep = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
        return subprocess.Popen(
            [self.python, SCENARIOS, scenario, url, json.dumps(given)],
            env=keep | quiet, text=True, cwd=SCENARIOS.parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def do(self, scenario: str, url: str, *, seconds: float = SECONDS, **given: Any) -> Any:
        """What was seen."""
        return self.finish(self.start(scenario, url, **given), seconds)

    def finish(self, process: subprocess.Popen[str], seconds: float = SECONDS) -> Any:
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            process.kill()
            process.wait(10)
        assert process.returncode == 0, f"{out}\n{err}"
        return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="session", params=VERSIONS)
def sdk(request: pytest.FixtureRequest) -> Sdk:
    return Sdk(request.param)


def keys() -> list[str]:
    return [f"keys.{tenant}={key}" for tenant, key in KEYS.items()]


@pytest.fixture(scope="session")
def server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests that do not stop it."""
    with tiny_server(tiny_model_dir, tmp_path_factory.mktemp("service"), *keys()) as found:
        yield found
