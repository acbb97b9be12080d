"""Where a benchmark's figures go: rows as they come, with commit, machine and date.

`results/NAME.json` holds what a benchmark found, table by table, each with the run it is
from, so that a part can be measured again alone. `results/NAME.md` and the table of all
figures in README.md are made from the JSON files alone, by every run that writes and by
`python benchmarks/record.py`. Measures nothing.
"""

from __future__ import annotations

import json
import operator
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Cell = str | int | float | None

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
BOUNDS = {"at least": operator.ge, "at most": operator.le, "under": operator.lt}
"""Words of what is wanted."""
KEPT = "<!-- Written by hand, and kept when figures are taken again. -->"


class Report:
    """What one benchmark finds. With `write` every row is on disk once it is known; without
    it, only printed. `doc` is the script's docstring: what is compared, and what is not."""

    def __init__(self, name: str, doc: str | None, *, write: bool) -> None:
        self.name, self._write = name, write
        self._path = RESULTS / f"{name}.json"
        old = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._content: dict[str, Any] = {"about": about(doc or ""), "tables": {}}
        self._content["tables"] = old.get("tables", {})
        self._begun: set[str] = set()

    def row(self, table: str, cells: Mapping[str, Cell]) -> None:
        """Add a row to a table; the first one replaces what an earlier run found."""
        rows = self._table(table)["rows"]
        if not rows:
            print(f"\n{table}\n{line(list(cells))}\n{line(['---'] * len(cells))}")
        rows.append(dict(cells))
        print(line([text(cell) for cell in cells.values()]), flush=True)
        self._save()

    def figure(self, table: str, name: str, value: float | str, wanted: str = "") -> None:
        """One number that the table comes down to, and what it should be."""
        self._table(table)["figures"][name] = {"value": value, "wanted": wanted}
        print(f"{name}: {text(value)}{f' (wanted: {wanted})' if wanted else ''}", flush=True)
        self._save()

    def plot(self, table: str, figure: Any) -> None:
        """A matplotlib figure that shows the table."""
        file = f"{self.name}_{re.sub('[^a-z0-9]+', '_', table.lower()).strip('_')}.png"
        self._table(table)["plot"] = file
        if self._write:
            figure.savefig(RESULTS / file, dpi=100, bbox_inches="tight")
        self._save()

    def rows(self, table: str) -> list[dict[str, Cell]]:
        """Of this run."""
        return self._content["tables"][table]["rows"] if table in self._begun else []

    def _table(self, table: str) -> dict[str, Any]:
        if table not in self._begun:
            self._begun.add(table)
            # At its old place, if it has one: pages keep their order.
            self._content["tables"][table] = {**where(), "rows": [], "figures": {}}
        return self._content["tables"][table]

    def _save(self) -> None:
        if self._write:
            RESULTS.mkdir(exist_ok=True)
            self._path.write_text(json.dumps(self._content, indent=1, ensure_ascii=False) + "\n")
            write_pages()


# ---------------------------------------------------------------- where it was measured


def where() -> dict[str, str]:
    return {
        "command": " ".join(["python", _from_root(sys.argv[0]), *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
    }


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", info)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return ", ".join(
        [
            f"{os.cpu_count()} cores {names[0] if names else platform.machine()}",
            f"{memory:.0f} GiB",
            f"Python {platform.python_version()}",
            *(f"{name} {found}" for name in ("torch", "transformers") if (found := _version(name))),
        ]
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """With "-dirty" where anything but results differs from it."""
    others = [":!benchmarks/results", ":!benchmarks/README.md"]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *others)
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    return commit + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _from_root(script: str) -> str:
    path = Path(script).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else script


# ---------------------------------------------------------------- pages


def about(doc: str) -> str:
    """A docstring without the lines that are commands."""
    paragraphs = [p for p in doc.strip().split("\n\n") if not p.startswith("    ")]
    return "\n\n".join(paragraphs)


def text(cell: Cell) -> str:
    """A number with as many digits as mean something."""
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or abs(cell) >= 1000:
        return f"{round(cell):,}"
    if cell == 0 or abs(cell) < 1e-3:
        return f"{cell:.2g}"
    decimals = next(d for d, least in enumerate((100, 10, 0.1, 0)) if abs(cell) >= least)
    return f"{cell:.{decimals}f}"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table_of(rows: Sequence[Mapping[str, Cell]]) -> str:
    """Columns in the order in which they first come up."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[text(row.get(name)) for name in columns] for row in rows]
    return "\n".join(map(line, lines))


def page(content: Mapping[str, Any]) -> str:
    """The page of one benchmark's results, without what was written by hand."""
    title, _, body = content["about"].partition("\n\n")
    parts = [f"# {title.rstrip('.')}", body] if body else [f"# {title.rstrip('.')}"]
    for name, found in content["tables"].items():
        parts += [f"## {name}", f"`{found['command']}`, {source(found)}."]
        parts += [table_of(found["rows"])] if found["rows"] else []
        parts += [f"![{name}]({found['plot']})"] if "plot" in found else []
        figures = [
            {"": figure, **is_and_wanted(entry)} for figure, entry in found["figures"].items()
        ]
        parts += [table_of(figures)] if figures else []
    return "\n\n".join(parts) + "\n"


def is_and_wanted(entry: Mapping[str, Any]) -> dict[str, Cell]:
    value, wanted = entry["value"], entry["wanted"]
    return {"is": value, "wanted": wanted, "reached": reached(value, wanted)}


def reached(value: float | str, wanted: str) -> str:
    """Whether a figure keeps the bound that is wanted, if one is."""
    word, _, bound = wanted.rpartition(" ")
    if word not in BOUNDS or isinstance(value, str):
        return ""
    return "yes" if BOUNDS[word](value, float(bound.replace(",", ""))) else "**no**"


def source(found: Mapping[str, str]) -> str:
    return f"commit {found['commit']}, {found['date']} UTC, {found['machine']}"


def results() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of every benchmark that has a JSON file."""
    for path in sorted(RESULTS.glob("*.json")):
        yield path.stem, json.loads(path.read_text())


def all_figures() -> str:
    """The table of README.md; machines are listed once, below it."""
    rows: list[dict[str, Cell]] = []
    machines: dict[str, int] = {}
    for name, content in results():
        for found in content["tables"].values():
            for figure, entry in found["figures"].items():
                number = machines.setdefault(found["machine"], len(machines) + 1)
                rows.append(
                    {
                        "figure": figure,
                        **is_and_wanted(entry),
                        "benchmark": f"[{name}](results/{name}.md)",
                        "commit": found["commit"],
                        "date": str(found["date"]).partition(" ")[0],
                        "machine": number,
                    }
                )
    listed = "\n".join(f"{number}. {name}" for name, number in machines.items())
    return f"{table_of(rows)}\n\nMachines:\n\n{listed}" if rows else "None yet."


def written_by_hand(path: Path) -> str:
    """What the page on disk says below the line that divides it, the line included."""
    before, divider, rest = path.read_text().partition(KEPT) if path.exists() else ("", "", "")
    del before
    return f"\n{divider}{rest}" if divider else f"\n{KEPT}\n"


def readme() -> str:
    """README.md with the table as it should be."""
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{all_figures()}\n\n{END}{after}"


def write_pages() -> None:
    for name, content in results():
        path = RESULTS / f"{name}.md"
        path.write_text(page(content) + written_by_hand(path))
    README.write_text(readme())


if __name__ == "__main__":
    write_pages()
