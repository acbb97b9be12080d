"""A tiny run as a program of its own, so that a test can kill it.

usage: python -m tests.backbone.resumable MODEL_DIR RUNS_DIR [--resume]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.tiny_run import tiny_job

if __name__ == "__main__":
    job = tiny_job(Path(sys.argv[1]), Path(sys.argv[2]), total_steps=6)
    job.tune(resume="--resume" in sys.argv)
