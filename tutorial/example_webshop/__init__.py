"""An agent that buys what it was asked for."""
