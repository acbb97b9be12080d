"""Calls in, token-masked samples out: a pure function."""

from astuner.context_tracker.tracker import build_samples

__all__ = ["build_samples"]
