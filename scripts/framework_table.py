"""The tables of docs/frameworks.md, made from what the tests of the frameworks have shown.

    python scripts/framework_table.py build/frameworks           # is the page in step with it?
    python scripts/framework_table.py build/frameworks --write   # bring it in step

Each line in the folder's files is what one passed test has shown (tests/frameworks/conftest.py).
It is kept in docs/frameworks.json, of which the page's table is made. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "frameworks.md"
SHOWN = ROOT / "docs" / "frameworks.json"
BEGIN, END = "<!-- made by scripts/framework_table.py -->\n", "<!-- end -->\n"

EXAMPLES = {
    "AgentScope 2": "agentscope_v2",
    "AgentScope 1": "agentscope_v1",
    "LangGraph": "langgraph_agent",
    "OpenAI Agents SDK": "openai_agents",
    "Agent Framework": "agent_framework_agent",
    "AutoGen": "autogen_agent",
    "smolagents": "smolagents_agent",
    "pydantic-ai": "pydantic_ai_agent",
    "CrewAI": "crewai_crew",
    "Anthropic SDK": "anthropic_loop",
    "plain HTTP": "plain_http",
}
DIALECTS = {"chat": "Chat Completions", "responses": "Responses", "messages": "Anthropic Messages"}
FEATURES = (
    "tools",
    "parallel",
    "streaming",
    "memory",
    "compaction",
    "multi-agent",
    "retries",
    "many episodes",
    "old style",
)
Shown = dict[str, Any]


def read(folder: Path) -> list[Shown]:
    """What was shown, in an order that does not depend on the run's."""
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted(map(json.loads, sorted(set(lines))), key=lambda one: (one["test"], str(one)))


def table(shown: list[Shown]) -> str:
    """One row for each framework and dialect; a cell is filled if a test has shown it."""
    head = ["framework", "version", "dialect", *FEATURES]
    rows = [head, ["---"] * len(head)]
    for framework, example in EXAMPLES.items():
        for dialect, title in DIALECTS.items():
            ours = [s for s in shown if (s["framework"], s["dialect"]) == (framework, dialect)]
            if not ours:
                continue
            features = {feature for one in ours for feature in one["features"]}
            link = f"[{framework}](../tutorial/frameworks/{example}.py)"
            cells = ["yes" if feature in features else "" for feature in FEATURES]
            rows.append([link, ours[0]["version"], title, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def with_table(page: str, shown: list[Shown]) -> str:
    """The page with this table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(shown)}\n{END}{after}"


def as_json(shown: list[Shown]) -> str:
    return json.dumps(shown, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ran", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    shown = read(args.ran)
    if not shown:
        sys.exit(f"Nothing is written down in {args.ran}. Run `make test-frameworks`.")
    files = {SHOWN: as_json(shown), PAGE: with_table(PAGE.read_text(), shown)}
    if args.write:
        for path, text in files.items():
            path.write_text(text)
        return
    if stale := [path.name for path, text in files.items() if path.read_text() != text]:
        sys.exit(f"Not what the tests have shown: {', '.join(stale)}. Run `make docs-frameworks`.")
    print(f"docs/frameworks.md is in step with the {len(shown)} things that the tests have shown.")


if __name__ == "__main__":
    main()
