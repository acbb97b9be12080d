"""Advantages, losses, KL estimators and aggregations: pure functions with their papers."""

from astuner.algorithm.registry import (
    ADVANTAGES,
    AGGREGATIONS,
    KLS,
    LOSSES,
    accepted,
    find_kl,
    find_loss,
    resolve,
)

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "KLS",
    "LOSSES",
    "accepted",
    "find_kl",
    "find_loss",
    "resolve",
]
