"""Examples: one folder each, with a workflow, a YAML file and a README."""
