"""A maths agent that works in several turns with a calculator, in plain text.

It needs no tool support from the model: a line `calc: 12 * 7` is evaluated and
the result comes back as the next message; the answer goes into \\boxed{}. One exchange is
shown, because a small model never writes such a line of itself. The workflow computes its
own reward, so it needs no judge.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from typing import Any

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask

SYSTEM_PROMPT = (
    "To calculate, write one line that begins with calc: and stop; the result will be sent to "
    "you. When you know the answer, write it in \\boxed{}."
)
SHOWN = [
    {"role": "user", "content": "Calculate 12 * 7."},
    {"role": "assistant", "content": "calc: 12 * 7"},
    {"role": "user", "content": "84"},
    {"role": "assistant", "content": "\\boxed{84}"},
]
MAX_TURNS = 4
FOR_CALL, FOR_ANSWER = 0.1, 0.1
"""What an episode without the right answer earns for having calculated something, and for
any answer."""

OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, or why it has none."""

    def value(node: ast.AST) -> float:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
        raise ValueError("only numbers, + - * / and brackets are allowed")

    try:
        result = value(ast.parse(expression.strip(), mode="eval"))
        if not math.isfinite(result):
            raise ValueError("the result is too large")
        return str(result) if isinstance(result, int) else f"{result:.10g}"
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        return f"error: {error}"


def same_number(answer: str, reference: str) -> bool:
    """Whether both name the same number, whatever the thousands separators and dollar signs."""
    numbers = [text.replace(",", "").strip(" $\\") for text in (answer, reference)]
    try:
        return float(numbers[0]) == float(numbers[1])
    except ValueError:
        return answer.strip() == reference.strip()


def boxed(text: str) -> str:
    """What stands in \\boxed{}; empty where there is none."""
    found = re.search(r"\\boxed\{([^}]*)\}", text)
    return found.group(1) if found else ""


def reference_of(workflow_task: WorkflowTask) -> str:
    """The right answer; in GSM8K it stands behind ####."""
    return str(workflow_task.metadata["answer"]).split("####")[-1].strip()


class MathToolWorkflow(Workflow):
    name: str = "math_agent_workflow"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        messages: list[Any] = [
            {"role": "system", "content": SYSTEM_PROMPT},
            *SHOWN,
            {"role": "user", "content": workflow_task.main_query},
        ]
        answer, called = "", False
        for _ in range(MAX_TURNS):
            completion = await client.chat.completions.create(model="tuned", messages=messages)
            text = completion.choices[0].message.content or ""
            messages.append({"role": "assistant", "content": text})
            if answer := boxed(text):
                break
            calc = re.search(r"calc:(.+)", text)
            hint = calculate(calc.group(1)) if calc else "Go on; end with \\boxed{answer}."
            called |= calc is not None and not hint.startswith("error")
            messages.append({"role": "user", "content": hint})
        correct = same_number(answer, reference_of(workflow_task))
        return WorkflowOutput(
            reward=1.0 if correct else FOR_CALL * called + FOR_ANSWER * bool(answer),
            is_success=correct,
            metadata={"final_answer": answer},
            log_metrics={"called": float(called), "answered": float(bool(answer))},
        )
