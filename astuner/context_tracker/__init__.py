"""Calls in, token-masked samples out: a pure function."""
