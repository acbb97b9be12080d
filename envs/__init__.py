"""Environments, one a folder: each has an `environment.py` with a `make(task_id, params)`."""
