"""One episode: run the workflow, judge it, track its calls."""
