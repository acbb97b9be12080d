"""Tests of the algorithm room."""
