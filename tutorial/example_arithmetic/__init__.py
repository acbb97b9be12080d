"""An agent that answers sums with a bare number."""
