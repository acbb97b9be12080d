"""A user's script: `python trinity_run.py MODEL RUNS STEPS [--resume] [SECTION.KEY=VALUE ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from tests import tiny_run
from tests.tiny_run import tiny_job

if __name__ == "__main__":
    model, runs, workflow, steps, *options = sys.argv[1:]
    job = tiny_job(
        Path(model), Path(runs), getattr(tiny_run, workflow), total_steps=int(steps), device="cpu"
    )
    job.config.backbone = "trinity"
    for option in options:
        if option != "--resume":
            key, _, value = option.partition("=")
            *sections, name = key.split(".")
            target = job.config
            for section in sections:
                target = getattr(target, section)
            setattr(target, name, yaml.safe_load(value))
    print("TUNED", job.tune(resume="--resume" in options).path)
