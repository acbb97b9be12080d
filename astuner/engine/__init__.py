"""Engines and policies: see `protocol` for the two seams; implementations are loaded lazily."""
