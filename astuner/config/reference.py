"""The reference pages of all keys, made from the schemas and their docstrings.

`python -m astuner.config.reference > docs/config.md` writes that of runs, and
`python -m astuner.config.reference service > docs/service_config.md` the service's; a test
compares page and schema, so neither can go stale.
"""

from __future__ import annotations

import json
import sys

from astuner.config.keys import RUN, Key, Table
from astuner.config.service import SERVICE

_HEAD = """# Configuration

Every key, its type, its default and what it means. This page is made from
`astuner/config/schema.py` by `python -m astuner.config.reference > docs/config.md`.

A file has one root key, `astuner`; what it does not name keeps its default:

```yaml
astuner:
  model: {path: smollm2-135m}
  rollout: {user_workflow: "tutorial.example_math_agent.math_agent_simplify->MathToolWorkflow"}
  task_reader: {type: huggingface_dat_repo, huggingface_dat_repo: {dataset_path: openai/gsm8k}}
  task_judge: {judge_type: number_match}
```

On the command line the same keys are written `rollout.num_repeat=4`; the root may be left out.
A value may come from the environment: `${oc.env:NAME}` or `${oc.env:NAME,default}`.
`astuner explain --conf x.yaml` shows each key's value, where it came from and whether it is read.
"""


_SERVICE_HEAD = """# Configuration of the fine-tuning service

Every key of [`astuner serve`](service.md), its type, its default and what it means. This page is
made from `astuner/config/service.py` by `python -m astuner.config.reference service`.

A file has one root key, `service`; on the command line the root may be left out:
`astuner serve --conf service.yaml limits.max_runs=8`. A value may come from the environment:
`${oc.env:NAME}` or `${oc.env:NAME,default}`.
"""


def render() -> str:
    """The whole page of runs as Markdown."""
    return _page(_HEAD, RUN)


def render_service() -> str:
    """The whole page of the service."""
    return _page(_SERVICE_HEAD, SERVICE)


def _page(head: str, table: Table) -> str:
    parts = [head]
    for section in table.sections.values():
        rows = [table.keys[name] for name in section.children if name in table.keys]
        if rows:
            parts.append(f"## `{table.full(section.name)}`\n\n{section.doc}\n\n{_table(rows)}")
    return "\n".join(parts)


def _table(rows: list[Key]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{key.leaf}` | {key.type_name.partition(',')[0]} | {_code(key.default)} "
        f"| {_cell(key.doc)}{_only(key)} |"
        for key in rows
    ]
    return "\n".join(lines) + "\n"


def _code(default: object) -> str:
    return f"`{_cell(json.dumps(default, ensure_ascii=False))}`"


def _only(key: Key) -> str:
    return f" Only for the backbone {' and '.join(key.backbones)}." if key.backbones else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(render_service() if sys.argv[1:] == ["service"] else render(), end="")
