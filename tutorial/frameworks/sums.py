"""What every example here shares: a task with two tools, and its reward."""

from __future__ import annotations

import re

from astuner import WorkflowOutput, WorkflowTask

SYSTEM = "Use the tools, then say the numbers."


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one number
        b: the other
    """
    return a + b


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: one number
        b: the other
    """
    return a * b


TOOLS = {"add": add, "multiply": multiply}

SCHEMAS = [
    {
        "name": name,
        "description": f"{name.capitalize()} two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    }
    for name in TOOLS
]
"""For the examples without a framework that would write them."""


def graded(answer: object, task: WorkflowTask) -> WorkflowOutput:
    """The share of the reference's numbers that the answer names."""
    wanted = set(re.findall(r"-?\d+", str(task.metadata["answer"])))
    found = wanted & set(re.findall(r"-?\d+", str(answer)))
    return WorkflowOutput(
        reward=len(found) / len(wanted),
        is_success=found == wanted,
        metadata={"final_answer": str(answer)},
    )
