"""astuner tunes the model behind an agent workflow with reinforcement learning.

The public names are loaded on first use, so that `import astuner` stays instant
and needs neither torch nor a server.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from astuner.job import AstunerJob, TunedModel
    from astuner.model_tuner import ModelTuner
    from astuner.task_runner.workflow import Workflow
    from astuner.types import Task, WorkflowOutput, WorkflowTask

_HOME = {
    "AstunerJob": "astuner.job",
    "TunedModel": "astuner.job",
    "ModelTuner": "astuner.model_tuner",
    "Workflow": "astuner.task_runner.workflow",
    "Task": "astuner.types",
    "WorkflowOutput": "astuner.types",
    "WorkflowTask": "astuner.types",
}

# Read when torch loads its OpenMP runtime (GNU's or LLVM's). By default its idle threads spin
# for long, and any other busy process then makes each step many times slower. With less than
# this they fall asleep between two products of one pass, and waking them takes longer than
# many a product. Where torch is loaded already it is too late, and nothing is touched.
if "torch" not in sys.modules:
    os.environ.setdefault("GOMP_SPINCOUNT", "8000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")

__version__ = "0.1.0"
__all__ = [
    "AstunerJob",
    "ModelTuner",
    "Task",
    "TunedModel",
    "Workflow",
    "WorkflowOutput",
    "WorkflowTask",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'astuner' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
