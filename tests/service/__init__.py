"""Tests of the fine-tuning service."""
