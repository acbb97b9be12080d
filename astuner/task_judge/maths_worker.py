"""A process of its own that compares mathematical answers by the math-verify package.

One JSON request a line on stdin, one JSON reply a line on stdout; ends at the end
of stdin. It stands alone (nothing of astuner is imported), because it runs as a
script: only in a main thread do math-verify's own time limits work, and only a
process can be ended when they do not.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[|\\begin")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")


def candidates(text: str) -> list[Any]:
    """What the text may mean as mathematics: a bare formula as one, prose by its formulas
    and numbers."""
    from math_verify import parse

    if not _MARKED.search(text) and not _PROSE.search(text):
        found = parse(f"${text}$")
        if found:
            return found
    return parse(text)


def compare(reference: str, answer: str) -> dict[str, bool]:
    """Whether the answer holds anything mathematical, and whether it equals the reference."""
    from math_verify import verify

    if answer.strip() == reference.strip():
        return {"parsed": True, "same": True}
    wanted, given = candidates(reference), candidates(answer)
    return {"parsed": bool(given), "same": bool(wanted and given and verify(wanted, given))}


def main() -> None:
    import math_verify  # noqa: F401  # pyright: ignore[reportUnusedImport]

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(compare(request["reference"], request["answer"])), flush=True)


if __name__ == "__main__":
    main()
