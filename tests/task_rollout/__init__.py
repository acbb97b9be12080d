"""Tests of the task_rollout room."""
