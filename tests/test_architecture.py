"""The floors of the house: who may import whom, and how long things may get."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "astuner"

FLOORS = [
    {"types", "errors"},
    {"config", "loading"},
    {
        "task_reader",
        "task_judge",
        "env",
        "chat",
        "engine",
        "context_tracker",
        "algorithm",
        "tracking",
    },
    {"model_tuner"},
    {"task_runner", "task_rollout", "trainer"},
    {"backbone", "service"},
    {"launcher", "job"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Two rooms of one floor where one may see the other: many episodes and one; a job and how it
# is launched; losses, and the shapes of what they get and return (engine.protocol).
SAME_FLOOR = {("task_rollout", "task_runner"), ("job", "launcher"), ("algorithm", "engine")}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    """The first name below the package: `astuner/chat/x.py` is in room `chat`."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms named by any import in the file, at whatever depth."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("astuner"):
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("astuner.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_lower_floors(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return  # lazy re-exports of the public names
    assert room in FLOOR, f"{room} has no floor: add it to FLOORS and to the design"
    for other in imported_rooms(path) - {room}:
        allowed = FLOOR[other] < FLOOR[room] or (room, other) in SAME_FLOOR
        assert allowed, f"{room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})"


def test_function_and_file_lengths() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    if not lengths:
        return
    too_long = {name: n for name, n in lengths.items() if n > 80}
    assert not too_long
    assert sum(n <= 40 for n in lengths.values()) >= 0.9 * len(lengths)
    files = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert sum(n <= 300 for n in files.values()) >= 0.8 * len(files), files


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(p.relative_to(ROOT)) for p in FILES if not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent


def test_no_utils_room() -> None:
    assert not [p for p in ROOT.rglob("*") if p.stem in {"utils", "helpers", "common", "misc"}]
