"""Tests of the context tracker."""
