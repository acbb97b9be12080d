"""A test that needs verl is skipped elsewhere, with a reason, and has no excuse at home."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TESTS = """
import pytest

@pytest.mark.verl
def test_needs_verl():
    pass

@pytest.mark.verl
def test_gives_up():
    pytest.skip("no mood")

@pytest.mark.verl_vllm
def test_needs_vllm():
    pass

def test_needs_nothing():
    pytest.skip("still allowed")
"""

GIVES_UP_WHOLE = "import pytest\npytest.importorskip('no_such_module')\n"


def outcomes(folder: Path, environment: str) -> tuple[int, str]:
    """Exit code and report of these tests, where this project's conftest is in force."""
    place = folder / "tests" / "backbone" / "verl"
    place.mkdir(parents=True)
    (folder / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  verl: x\n  verl_vllm: x\n")
    (place / "test_some.py").write_text(TESTS)
    (place / "test_whole.py").write_text(GIVES_UP_WHOLE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-ra", "--continue-on-collection-errors"],
        cwd=folder, capture_output=True, text=True, timeout=60,
        env=os.environ | {"ASTUNER_TEST_ENV": environment},
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.skipif(find_spec("verl") is not None, reason="verl is installed here")
def test_elsewhere_they_are_skipped_with_the_command_to_run_them(tmp_path: Path) -> None:
    code, said = outcomes(tmp_path, "")
    assert code == 0, said
    assert "5 skipped" in said
    assert said.count("needs verl and ray: make test-verl\n") == 2
    assert said.count("needs verl and ray and vllm: make test-verl-vllm\n") == 1


def test_at_home_one_that_does_not_run_has_failed(tmp_path: Path) -> None:
    code, said = outcomes(tmp_path, "verl")
    assert code == 1, said
    assert "1 failed, 2 passed, 1 skipped, 1 error" in said
    assert "FAILED tests/backbone/verl/test_some.py::test_gives_up - skipped, but this is" in said
    assert "ERROR tests/backbone/verl/test_whole.py - skipped, but this is the env" in said
