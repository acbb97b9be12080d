"""An agent that learns from what its users thought of it."""
