"""An agent that crosses a frozen lake."""
