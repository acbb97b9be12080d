"""Advantages, aggregation weights and losses: small pure functions, each with its paper."""
