"""Datasets to Tasks."""
