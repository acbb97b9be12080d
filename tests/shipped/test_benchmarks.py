"""The pages of benchmarks/ say what their JSON files say, and every script is on them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .artefacts import ROOT

FOLDER = ROOT / "benchmarks"
PARTS = {
    "decode_vllm", "proxy_sides", "record", "service_client", "vs_trl_agent", "vs_trl_worker",
    "waiting",
}  # fmt: skip
"""Modules of other scripts, not run themselves."""
SCRIPTS = sorted({path.stem for path in FOLDER.glob("*.py")} - PARTS)


@pytest.fixture(scope="module")
def record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record", FOLDER / "record.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("record", module)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_all_figures_is_that_of_the_json_files(record: ModuleType) -> None:
    assert record.README.read_text() == record.readme(), "run `python benchmarks/record.py`"


def test_every_page_of_results_is_that_of_its_json_file(record: ModuleType) -> None:
    for name, content in record.results():
        path = record.RESULTS / f"{name}.md"
        assert path.read_text() == record.page(content) + record.written_by_hand(path)
        for found in content["tables"].values():
            assert found["rows"] and {"command", "commit", "date", "machine"} <= set(found)
            assert "plot" not in found or (record.RESULTS / found["plot"]).is_file()


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_listed_and_run_by_make_bench(name: str) -> None:
    assert f"| `{name}.py` |" in (FOLDER / "README.md").read_text()
    bench = (ROOT / "Makefile").read_text().partition("\nbench:")[2].partition("\n\n")[0]
    assert f"benchmarks/{name}.py" in bench
    doc = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    assert f"benchmarks/{name}.py" in doc and "does not show" in doc.lower()


# ---------------------------------------------------------------- how they are written


@pytest.fixture
def results(record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "README", tmp_path / "README.md")
    record.README.write_text(f"before\n{record.BEGIN}\nold\n{record.END}\nafter\n")
    return tmp_path


def test_a_row_is_on_disk_as_soon_as_it_is_known(record: ModuleType, results: Path) -> None:
    report = record.Report("speed", "What is fast.\n\n    python x.py\n\nCompares.", write=True)
    report.row("Fast", {"what": "a", "s": 1.234})
    found = json.loads((results / "speed.json").read_text())["tables"]["Fast"]
    assert found["rows"] == [{"what": "a", "s": 1.234}]
    page = (results / "speed.md").read_text()
    assert page.startswith("# What is fast\n\nCompares.\n\n## Fast\n")
    assert "| what | s |\n| --- | --- |\n| a | 1.23 |" in page and "python x.py" not in page


def test_a_part_measured_again_leaves_the_others(record: ModuleType, results: Path) -> None:
    first = record.Report("speed", "T.", write=True)
    first.row("Fast", {"s": 1})
    first.row("Slow", {"s": 2})
    first.figure("Fast", "times faster", 15.2, "at least 15")
    (results / "speed.md").write_text((results / "speed.md").read_text() + "By hand.\n")
    second = record.Report("speed", "T.", write=True)
    second.row("Slow", {"s": 3})
    tables = json.loads((results / "speed.json").read_text())["tables"]
    assert {name: table["rows"] for name, table in tables.items()} == {
        "Fast": [{"s": 1}],
        "Slow": [{"s": 3}],
    }
    assert (results / "speed.md").read_text().endswith(f"{record.KEPT}\nBy hand.\n")
    readme = record.README.read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    assert re.search(r"\| times faster \| 15.2 \| at least 15 \| yes \| \[speed\]", readme)


def test_without_write_nothing_is_written(record: ModuleType, results: Path) -> None:
    report = record.Report("speed", "T.", write=False)
    report.row("Fast", {"s": 1})
    assert [path.name for path in results.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((1234.5, "1,234"), (12345, "12,345"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23")),
        *((0.1234, "0.12"), (0.01234, "0.012"), (0.0, "0"), (2.5e-6, "2.5e-06"), (None, "")),
    ],
)
def test_numbers_have_as_many_digits_as_mean_something(
    record: ModuleType, value: float | None, shown: str
) -> None:
    assert record.text(value) == shown


@pytest.mark.parametrize(
    ("value", "wanted", "said"),
    [
        (15, "at least 15", "yes"),
        (14.9, "at least 15", "**no**"),
        (1499, "at least 1,500", "**no**"),
        (3, "at most 3", "yes"),
        (3, "under 3", "**no**"),
        (3, "", ""),
        ("~3", "at most 3", ""),
    ],
)
def test_whether_a_figure_is_reached(
    record: ModuleType, value: float | str, wanted: str, said: str
) -> None:
    assert record.reached(value, wanted) == said


# ---------------------------------------------------------------- what merging.py compares


@pytest.mark.parametrize("workflow", ["chat", "tool use", "multi-agent", "forked"])
def test_all_ways_of_merging_train_the_same_tokens_and_apart_nothing_is_shared(
    workflow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    merging = importlib.import_module("merging")
    from astuner.engine.embedded.packing import pack

    turns = 5
    each, merged = (
        merging.group(merging.WORKFLOWS[workflow], turns, m) for m in ("none", "prefix")
    )
    calls = merging.EPISODES * turns * (2 if workflow == "forked" else 1)
    assert len(each) == calls
    sampled = 10 if workflow == "tool use" else 12
    assert [sum(s.num_trained for s in way) for way in (each, merged)] == [calls * sampled] * 2

    def nodes(samples: list[Any]) -> int:
        return sum(len(row.ids_T) for row in pack(samples, 10**6))

    # The last trained token of a sample is never an input.
    assert nodes(merging.apart(each)) == merging.tokens(each) - len(each)
    assert nodes(merging.apart(merged)) == merging.tokens(merged) - len(merged)
    assert nodes(merged) < nodes(merging.apart(merged)) < nodes(merging.apart(each))
