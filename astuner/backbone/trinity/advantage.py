"""Trinity's advantage function (`algorithm.advantage_fn`): passes astuner's own through.

Advantages are credited where a whole group and its episodes' rewards are known, in
`experience`. Nothing is computed here.
"""

from __future__ import annotations

from typing import Any

from trinity.algorithm.advantage_fn.advantage_fn import (  # pyright: ignore[reportMissingImports]
    AdvantageFn,
)
from trinity.buffer.operators import ExperienceOperator  # pyright: ignore[reportMissingImports]


class GroupAdvantage(AdvantageFn, ExperienceOperator):  # pyright: ignore[reportUntypedBaseClass]
    """Found by its dotted path."""

    def __init__(self, **_: Any) -> None:
        """None are given: the job file says how episodes are weighed."""

    def process(self, exps: list[Any]) -> tuple[list[Any], dict[str, float]]:
        """The experiences as they are, their returns set. Raises ValueError for foreign ones."""
        for exp in exps:
            if exp.advantages is None:
                raise ValueError(
                    "An experience has no advantages: it is not of astuner's workflow."
                )
            exp.returns = exp.advantages.clone()
        return exps, {}

    def __call__(self, exps: list[Any], **_: Any) -> tuple[list[Any], dict[str, float]]:
        return self.process(exps)

    @classmethod
    def compute_in_trainer(cls) -> bool:
        return False

    @classmethod
    def default_args(cls) -> dict[str, Any]:
        return {}
