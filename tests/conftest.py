"""Shared by all tests: one thread for torch, so that parallel runs do not fight over cores.

Tests with a marker of NEEDS need an environment of their own. Elsewhere they are skipped,
with the command that runs them. Under that command (ASTUNER_TEST_ENV names the
environment) one that cannot run has failed, whatever the reason.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if find_spec("hypothesis"):  # the frameworks' environments have none
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow]
    settings.register_profile("any machine", deadline=None, suppress_health_check=slow)
    settings.load_profile("any machine")

NEEDS = {
    "verl": ("verl", "ray"),
    "verl_vllm": ("verl", "ray", "vllm"),
    "trinity": ("trinity", "ray", "tinker", "vllm"),
    "frameworks": ("langchain", "agents", "smolagents"),
    "frameworks_openai2": ("crewai",),
}
"""The modules that the tests with a marker cannot do without."""

RUN_BY = {
    "verl": "make test-verl",
    "verl_vllm": "make test-verl-vllm",
    "trinity": "make test-trinity",
    "frameworks": "make test-frameworks",
    "frameworks_openai2": "make test-frameworks",
}
BACKEND_FOLDERS = ("tests/backbone/verl",)


def here() -> str:
    """The environment whose tests must all run: verl, verl-vllm-cpu or none."""
    return os.environ.get("ASTUNER_TEST_ENV", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if here():
        return
    for item in items:
        for marker, modules in NEEDS.items():
            missing = [name for name in modules if find_spec(name) is None]
            if missing and item.get_closest_marker(marker):
                reason = f"needs {' and '.join(missing)}: {RUN_BY[marker]}"
                item.add_marker(pytest.mark.skip(reason=reason))
                break


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if here() and any(item.get_closest_marker(marker) for marker in NEEDS):
        no_excuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if here() and report.nodeid.startswith(BACKEND_FOLDERS):
        no_excuse(report)
    return report


def no_excuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A skip becomes a failure: in its own environment a test has no reason not to run."""
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but this is the environment to run it in: {report.longrepr}"


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama that transformers loads."""
    from tests.tiny_run import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")
