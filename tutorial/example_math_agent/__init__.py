"""An agent that solves word problems with a calculator."""
