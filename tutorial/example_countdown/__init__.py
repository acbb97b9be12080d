"""An agent that makes a number out of others, and is told when it missed."""
