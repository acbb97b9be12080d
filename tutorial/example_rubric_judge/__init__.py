"""An agent judged by another model, by a rubric that was made from a few examples."""
