"""Typed configuration: schema, loading, overrides and explanation. Imports nothing heavy."""
