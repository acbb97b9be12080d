"""Which checkpoints of a trainer stay: the lasting ones, and the newest to resume from.

Such a trainer saves at one interval. astuner has two (`save_freq`, of which
`keep_checkpoints` last, and `resume_freq`, of which only the newest stays), so the trainer
saves at both (`choices.save_every`) and the surplus is deleted. How, is the backbone's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_FOLDER = re.compile(r"global_step_(\d+)")


def steps_in(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    found = (_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def surplus(steps: Iterable[int], now: int, *, every: int, keep: int, last: int) -> list[int]:
    """Steps whose checkpoints go, after that of step `now` was saved.

    Lasting are those of every `every` steps (0: none) and of the `last` step; the newest
    `keep` of them stay (0: all). Of the others only `now` does. Later ones than `now` are of
    a run that was wound back, and are left alone.
    """
    upto = sorted(step for step in steps if step <= now)
    lasting = [step for step in upto if step == last or (every > 0 and step % every == 0)]
    gone = lasting[:-keep] if keep else []
    return sorted([*gone, *(step for step in upto if step not in lasting and step != now)])
