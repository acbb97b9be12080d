"""Rewards for what a workflow returned."""
