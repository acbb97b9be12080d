"""docs/service.md and docs/service_users.md keep their word: commands, code and messages.

They are run against a server of a tiny model, in the environment of the tests.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from astuner.config.service import load_service_config
from astuner.service.tenants import Tenants
from tests.service.server import Server, tiny_server

from .artefacts import ROOT, blocks, commands
from .test_verl_page import filled, source

pytest.importorskip("tinker")
OPERATORS = ROOT / "docs" / "service.md"
USERS = ROOT / "docs" / "service_users.md"
OF_THE_SDK = ("A previous request failed; this TrainingClient is poisoned",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the page's first file."""
    (tmp_path / "service.yaml").write_text(blocks(OPERATORS, "yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- for who runs it


def test_the_files_shown_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BOB_KEY", raising=False)
    shown = blocks(OPERATORS, "yaml")
    assert len(shown) == 2
    for text in shown:
        (tmp_path / "service.yaml").write_text(text)
        config = load_service_config(tmp_path / "service.yaml")
        Tenants({str(tenant): str(key) for tenant, key in config.keys.items()})
    assert config.otel.exporter == "otlp"


def test_the_command_lines_are_accepted(folder: Path) -> None:
    lines = [shlex.split(line) for line in commands(OPERATORS, "astuner")]
    assert len(lines) == 3 and all(words[1] == "serve" for words in lines)
    assert load_service_config(None, [f"model.path={lines[0][3]}"]).port == 8765
    config = load_service_config(folder / lines[2][3], lines[2][4:])
    assert (config.port, config.limits.max_rank, config.limits.max_runs) == (9000, 32, 16)


@pytest.mark.timeout(300)
def test_a_server_starts_and_answers(folder: Path, tiny_model_dir: Path) -> None:
    """From the page's file, and asked what the page asks."""
    line = commands(OPERATORS, "astuner")[-1]
    server = Server(tiny_model_dir, folder / "data", command=shlex.split(line))
    try:
        server.wait_ready()
        assert "for alice, bob." in server.output()
        ask(server)
        assert server.stop(signal.SIGTERM) == 0
    finally:
        server.kill()


def ask(server: Server) -> None:
    (line,) = commands(OPERATORS, "curl")
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    asked = shlex.split(line.replace("http://127.0.0.1:8765", server.url))
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    assert done.stdout == '{"status":"ok"}', done.stderr


def test_every_metric_is_named() -> None:
    code = "".join(path.read_text() for path in (ROOT / "astuner" / "service").glob("*.py"))
    named = set(re.findall(r'"(astuner\.[a-z_.]+)"', code)) - {"astuner.service"}
    shown = set(re.findall(r"`(astuner\.[a-z_.]+)`", OPERATORS.read_text()))
    assert shown == named


# ---------------------------------------------------------------- for its users


def user_script() -> str:
    """All the page's Python, as one program for the tiny model."""
    script = "\n".join(blocks(USERS, "python"))
    assert script.count('"smollm2-135m"') == 1
    return script.replace('"smollm2-135m"', '"tiny"')


@pytest.mark.timeout(300)
def test_the_python_blocks_run(tmp_path: Path, tiny_model_dir: Path) -> None:
    with tiny_server(tiny_model_dir, tmp_path / "data") as server:
        exports = re.findall(r"(TINKER_\w+)=\S+", "".join(blocks(USERS, "bash")))
        assert exports == ["TINKER_BASE_URL", "TINKER_API_KEY"]
        done = subprocess.run(
            [sys.executable, "-W", "error:DEPRECATED", "-c", user_script()],
            env=os.environ | dict(zip(exports, (server.url, server.key), strict=True)),
            cwd=tmp_path, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"^loss (\S+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert "goes on as" in done.stdout
    taken = {f.name for f in (tmp_path / "adapter" / "moon").iterdir()}
    assert taken == {"adapter_config.json", "adapter_model.safetensors"}


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize("page", [OPERATORS, USERS], ids=lambda page: page.stem)
def test_the_tables_show_messages_that_exist(page: Path) -> None:
    table = page.read_text().partition("## When something goes wrong")[2]
    seen = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    pieces = [p for cell in seen for q in re.findall(r"`([^`]+)`", cell) for p in q.split("...")]
    found = [p.strip(" :") for p in pieces if len(p.strip(" :")) > 4]
    assert len(found) >= 8
    code = source()
    missing = [t for t in found if t not in OF_THE_SDK and not re.search(filled(t), code)]
    assert missing == []
