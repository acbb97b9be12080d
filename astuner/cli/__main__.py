"""`python -m astuner.cli`: the same as the installed `astuner` command."""

from astuner.cli import script

script()
