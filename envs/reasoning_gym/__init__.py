"""Reasoning-gym's puzzles as environments of one step."""
