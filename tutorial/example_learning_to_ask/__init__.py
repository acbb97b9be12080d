"""An agent that must ask before it can know the answer."""
