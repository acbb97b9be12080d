"""Tests of the task_runner room."""
