"""Gymnasium's toy text games."""
