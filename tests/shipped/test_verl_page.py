"""docs/verl.md keeps its word: its commands, and the messages that it explains.

Commands that start verl run in verl's own environment, on the CPU and a tiny model; those
that need a Ray cluster of several machines are only parsed.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from astuner.backbone.verl.translate import translation
from astuner.cli import main
from astuner.config.load import check_backbone, load_config

from .artefacts import PROBLEMS, ROOT, blocks, commands, gsm8k_folder, offline_datasets, tiny

PAGE = ROOT / "docs" / "verl.md"
NOT_OURS = ("CUDA out of memory", "No available memory for the cache blocks")
"""Messages of torch and vLLM."""


def typed() -> list[str]:
    """The page's `astuner` lines, but those for a cluster."""
    return [line for line in commands(PAGE, "astuner") if "--ray-address" not in line]


# ---------------------------------------------------------------- commands


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for shipped in ("configs", "tutorial"):
        (tmp_path / shipped).symlink_to(ROOT / shipped)
    monkeypatch.chdir(tmp_path)
    offline_datasets(tmp_path / "cache", monkeypatch)
    return tmp_path


def test_what_needs_no_verl(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = [line for line in typed() if line.split()[1] in ("doctor", "explain")]
    assert len(free) == 2
    for line in free:
        assert main(shlex.split(line)[1:]) == 0
        assert "verl" in capsys.readouterr().out


@pytest.mark.verl
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("ray")
def test_what_starts_verl(
    folder: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Run, resume (nothing is left to do), chat."""
    small = [*tiny(tiny_model_dir), *gsm8k_folder(folder / "rows", PROBLEMS)]
    lines = [line for line in typed() if line.split()[1] not in ("doctor", "explain")]
    assert [line.split()[1] for line in lines] == ["--conf", "--conf", "chat"]
    for line in lines:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n"))
        arguments = shlex.split(line)[1:]
        code = main(arguments + (small if "--conf" in arguments else []))
        said = capsys.readouterr()
        assert code == 0, f"{line}\n{said.out}{said.err}"
    assert (folder / "runs" / "math_verl" / "model" / "model.safetensors").is_file()


def test_the_line_for_trying_out_is_accepted() -> None:
    text = "".join(blocks(PAGE, "bash")).replace("\\\n", " ")
    [line] = re.findall(r"^python scripts/install.py .*", text, re.MULTILINE)
    install, _, command = line.partition(" -- ")
    name = install.split()[-1]
    assert (ROOT / "requirements" / f"{name}.txt").is_file()
    words = command.split()
    conf, backbone = (words[words.index(option) + 1] for option in ("--conf", "--backbone"))
    overrides = [word for word in words if re.match(r"[\w.]+=", word)]
    overrides.append("trainer_common.device=cpu")
    loaded = load_config(ROOT / conf, overrides, backbone=backbone)
    assert check_backbone(loaded, "verl") == []
    assert translation(loaded.config).problems == ()


# ---------------------------------------------------------------- messages


def quoted() -> list[str]:
    """What the table shows as seen, cut where it leaves something out."""
    table = PAGE.read_text().partition("## When something goes wrong")[2].partition("\n## ")[0]
    seen = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    pieces = [p for cell in seen for q in re.findall(r"`([^`]+)`", cell) for p in q.split("...")]
    return [p.strip(" ,;:()") for p in pieces if len(p.strip(" ,;:()")) > 4]


def source() -> str:
    """All of astuner, with messages that go over several lines joined."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "astuner").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text).replace('\\"', '"')


def test_the_table_shows_messages_that_exist() -> None:
    """A number or a quoted word may be a value that the code fills in."""
    code, found = source(), quoted()
    assert len(found) > 20
    missing = [text for text in found if text not in NOT_OURS and not re.search(filled(text), code)]
    assert missing == []


def filled(text: str) -> str:
    """A pattern for the text in which figures, quoted words and the backbone's name may be
    `{expressions}`."""
    value = r"\{[^{}]*\}"
    parts = re.split(r"('[^']*'|\d+|\bverl\b)", text)
    return "".join(
        f"(?:{re.escape(part)}|{value})" if at % 2 else re.escape(part)
        for at, part in enumerate(parts)
    )
