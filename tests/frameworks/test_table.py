"""docs/frameworks.md says what the tests have shown, no more and no less."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from .conftest import PACKAGES

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import framework_table as made  # noqa: E402 - a script's module, outside the package

LISTS = ("frameworks", "frameworks-openai2")


def shown() -> list[made.Shown]:
    return json.loads(made.SHOWN.read_text())


def test_the_table_is_made_of_what_was_shown() -> None:
    page = made.PAGE.read_text()
    assert made.with_table(page, shown()) == page
    assert page.count(made.BEGIN) == page.count(made.END) == 1


def test_every_test_that_shows_something_was_run() -> None:
    """So a test that is added or renamed needs `make docs-frameworks`."""
    written: set[str] = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.AsyncFunctionDef) and re.search(
                r"\b(shows|case|in_each_dialect)\(", ast.unparse(node)
            ):
                written.add(f"tests/frameworks/{file.name}::{node.name}")
    assert {one["test"].partition("[")[0] for one in shown()} == written
    assert len(written) > 50


def test_the_versions_are_those_of_the_environments() -> None:
    pinned = {
        line
        for name in LISTS
        for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    }
    ran = {f"{PACKAGES[s['framework']]}=={s['version']}" for s in shown() if s["version"]}
    assert ran - pinned == set()
    assert {s["framework"] for s in shown()} == set(PACKAGES) == set(made.EXAMPLES)


@pytest.mark.parametrize("name", made.EXAMPLES.values())
def test_an_example_is_short_and_changes_only_the_model(name: str) -> None:
    text = (ROOT / "tutorial" / "frameworks" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    assert len(re.findall(r"tuner\.as_\w+\(", text)) == 1


def test_a_cell_is_filled_by_what_was_shown(tmp_path: Path) -> None:
    line = {"framework": "CrewAI", "version": "1", "dialect": "chat", "features": ["tools"]}
    other = {**line, "features": ["retries"], "test": "b"}
    (tmp_path / "1.jsonl").write_text(f"{json.dumps({**line, 'test': 'a'})}\n" * 2)
    (tmp_path / "2.jsonl").write_text(f"{json.dumps(other)}\n")
    read = made.read(tmp_path)
    assert [one["test"] for one in read] == ["a", "b"]
    assert made.table(read).splitlines()[2:] == [
        "| [CrewAI](../tutorial/frameworks/crewai_crew.py) | 1 | Chat Completions "
        "| yes |  |  |  |  |  | yes |  |  |"
    ]
