"""docs/trinity.md keeps its word: its commands, and the messages that it explains.

What starts Trinity is run in its own environment by tests/backbone/trinity; here those lines
are parsed and translated.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from astuner.backbone.trinity.translate import translation
from astuner.cli import main
from astuner.config.load import check_backbone, load_config

from .artefacts import ROOT, blocks, commands
from .test_verl_page import source

PAGE = ROOT / "docs" / "trinity.md"
THEIRS = ("nvidia-smi", "CUDA_VISIBLE_DEVICES")


def test_what_needs_no_trinity(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    free = [line for line in commands(PAGE, "astuner") if line.split()[1] in ("doctor", "explain")]
    assert len(free) == 2
    for line in free:
        assert main(shlex.split(line)[1:]) == 0
        assert "trinity" in capsys.readouterr().out


def test_what_starts_trinity_is_accepted() -> None:
    text = "".join(blocks(PAGE, "bash"))
    lines = re.findall(r"astuner (--conf \S+)", text)
    assert len(lines) == 3
    for line in lines:
        loaded = load_config(ROOT / line.split()[1])
        assert check_backbone(loaded, "trinity") == []
        assert translation(loaded.config).problems == ()
    [name] = re.findall(r"--env (\w+) --", text)
    assert (ROOT / "requirements" / f"{name}.txt").is_file()


def test_the_yaml_on_the_page_is_a_configuration(tmp_path: Path) -> None:
    [text] = blocks(PAGE, "yaml")
    (tmp_path / "x.yaml").write_text(text)
    loaded = load_config(tmp_path / "x.yaml")
    assert check_backbone(loaded, "trinity") == []
    assert loaded.config.trinity == {"log": {"level": "DEBUG"}, "explorer": {"runner_per_model": 4}}
    assert translation(loaded.config).problems == ()


def test_the_configurations_of_the_page_are_those_that_are_shipped() -> None:
    named = set(re.findall(r"configs/(math_trinity\w*)\.yaml", PAGE.read_text()))
    assert named == {path.stem for path in ROOT.glob("configs/math_trinity*.yaml")}


def seen() -> list[str]:
    """What the first table shows as seen, cut where it leaves something out."""
    table = PAGE.read_text().partition("## When something goes wrong")[2]
    table = table.partition("Trinity's own traps")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    quoted = [q for cell in cells for q in re.findall(r"``? ?([^`]+)", cell)]
    pieces = [p.strip(" ,;:()") for q in quoted for p in q.split("...")]
    return [p for p in pieces if len(p) > 12 and not p.startswith("exit")]


def test_the_table_shows_messages_that_exist() -> None:
    """Figures, quoted words and the program's name may be values that the code fills in."""
    code, found = source(), seen()
    assert len(found) > 15
    assert [text for text in found if not re.search(filled(text), code)] == []


def filled(text: str) -> str:
    value = r"\{[^{}]*(?:\{[^{}]*\})?[^{}]*\}"
    parts = re.split(r"('[^']*'|\d+|\bTrinity\b|\btrinity\b)", text)
    return "".join(
        f"(?:{re.escape(part)}|{value})" if at % 2 else re.escape(part)
        for at, part in enumerate(parts)
    )
