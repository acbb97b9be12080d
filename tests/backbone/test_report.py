"""How a run says what to type next."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from astuner.backbone.report import executable


@pytest.fixture(autouse=True)
def no_named_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASTUNER_COMMAND", raising=False)


def test_the_command_of_an_environment_that_is_not_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/astuner").write_text("")
    (tmp_path / ".venv/bin/astuner").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.chdir(tmp_path)
    assert executable() == ".venv/bin/astuner"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert executable() == str(tmp_path / ".venv/bin/astuner")
    monkeypatch.setenv("PATH", str(tmp_path / ".venv/bin") + os.pathsep + os.environ["PATH"])
    assert executable() == "astuner"


def test_the_line_that_brought_an_environment_with_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTUNER_COMMAND", "python scripts/install.py --env verl -- astuner")
    assert executable() == "python scripts/install.py --env verl -- astuner"
