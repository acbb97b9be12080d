"""The numbers round of Countdown, with several tries.

The model gets some numbers and a target, and writes one expression that uses each number
once. Three solved puzzles show it how. Whatever it makes instead of the target is told to
it, and it may try again: so it learns both to find the operator at once and to use what it
was told. Only tries, no reasoning: a model of this size has none to offer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.example_math_agent.math_agent_simplify import calculate

TRIES = 3
FOR_ONE_LESS = 0.2
"""What each try but the first costs."""
EXAMPLES = ((12, (3, 4), "3 * 4"), (5, (9, 4), "9 - 4"), (11, (6, 5), "6 + 5"))
FOR_FORM = 0.1
"""What an episode earns when all its tries were expressions of the right numbers."""


class CountdownWorkflow(Workflow):
    name: str = "countdown"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        puzzle = workflow_task.metadata["reasoning_gym"]["entry"]["metadata"]
        numbers, target = puzzle["numbers"], puzzle["target"]
        messages = [*shown(), {"role": "user", "content": question(numbers, target)}]
        well_formed, tries, solved = 0, 0, False
        while tries < TRIES and not solved:
            reply = await client.chat.completions.create(model="tuned", messages=messages)
            text = reply.choices[0].message.content or ""
            made = value(text, numbers)
            tries += 1
            well_formed += made is not None
            solved = made == str(target)
            messages += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": told(made, numbers, target)},
            ]
        reward = 1 - FOR_ONE_LESS * (tries - 1) if solved else FOR_FORM * well_formed / tries
        return WorkflowOutput(
            reward=reward,
            is_success=solved,
            metadata={"tries": tries, "well_formed": well_formed},
            log_metrics={"tries": float(tries), "well_formed": well_formed / tries},
        )


def shown() -> list[dict[str, str]]:
    """The solved puzzles, as if the model had solved them."""
    return [
        {"role": role, "content": content}
        for target, numbers, answer in EXAMPLES
        for role, content in (("user", question(numbers, target)), ("assistant", answer))
    ]


def question(numbers: Sequence[int], target: int) -> str:
    listed = " and ".join(map(str, numbers))
    return f"Make {target} from {listed} with +, - or *. Reply with just the expression."


def value(text: str, numbers: Sequence[int]) -> str | None:
    """What an expression makes; None where it is none, or not of these numbers once each."""
    used = sorted(map(int, re.findall(r"\d+", text[:100])))
    if used != sorted(numbers):
        return None
    result = calculate(text[:100])
    return None if result.startswith("error") else result


def told(made: str | None, numbers: Sequence[int], target: int) -> str:
    """The answer to a try that missed."""
    if made is None:
        return f"That is no expression of {' and '.join(map(str, numbers))}. Try again."
    return f"That makes {made}, not {target}. Try again."
