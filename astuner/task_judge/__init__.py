"""Who gives the reward: judges of one's own, ready ones, and the reading of their outcome."""

from __future__ import annotations

from astuner.errors import RewardError
from astuner.task_judge.judge import JUDGES, Judge, make_judge, score, wrap_judge
from astuner.task_judge.verdict import Verdict, to_verdict

__all__ = [
    "JUDGES",
    "Judge",
    "RewardError",
    "Verdict",
    "make_judge",
    "score",
    "to_verdict",
    "wrap_judge",
]
