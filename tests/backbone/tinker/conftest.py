"""One service for all tests of this folder that leave it running."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from tests.backbone.tinker.world import KEY, Running, running


@pytest.fixture(scope="session")
def service(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    with running(tiny_model_dir, tmp_path_factory.mktemp("service")) as one:
        yield one


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
