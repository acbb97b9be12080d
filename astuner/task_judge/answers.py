"""Where a judge finds the model's answer and the reference, and how to read numbers.

The answer is what the workflow put into its output's metadata, else the text of
the last LLM reply (which the runner leaves under "last_reply"). Numbers are exact
decimals, so large integers do not blur.
"""

from __future__ import annotations

import decimal
import re
from decimal import Decimal
from typing import Any

from astuner.config.schema import TaskJudgeConfig
from astuner.errors import DataError, UserCodeError
from astuner.types import WorkflowOutput, WorkflowTask

LAST_REPLY = "last_reply"
_MARK = "####"
"""GSM8K's mark before the final answer."""
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-+\u2212])?[$€£¥]?\s?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,]*\d)|\d+(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?"
    r"(?:\s?/\s?(?P<below>\d+(?:\.\d+)?))?"
    r"(?P<percent>\s?\\?%)?"
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_CLOSE = Decimal("1e-6")
"""Numbers are equal if they differ by no more (below 0.01: by one part in 10,000)."""


def answer_text(output: WorkflowOutput, config: TaskJudgeConfig) -> str:
    """The model's answer, stripped; "" where the workflow says it has none (None).

    Raises UserCodeError where there is neither an answer nor a reply to judge.
    """
    for key in (config.output_key, LAST_REPLY):
        if key in output.metadata:
            value = output.metadata[key]
            return "" if value is None else str(value).strip()
    raise UserCodeError(
        f"There is nothing to judge: the workflow returned no metadata[{config.output_key!r}] "
        f"(only {sorted(output.metadata)}) and made no LLM call. Return "
        f'WorkflowOutput(metadata={{"{config.output_key}": ...}}), or set '
        "astuner.task_judge.output_key."
    )


def reference(task: WorkflowTask, config: TaskJudgeConfig) -> Any:
    """The reference answer of the task. Raises DataError if it has none."""
    value = task.metadata.get(config.answer_key)
    if value is None:
        raise DataError(
            f"The task {task.task.task_id!r} has no reference answer: its metadata has "
            f"{sorted(task.metadata)}, not {config.answer_key!r}. Set "
            "astuner.task_reader.fields.answer or astuner.task_judge.answer_key."
        )
    return value


def reference_text(task: WorkflowTask, config: TaskJudgeConfig) -> str:
    """The reference as text; of a worked solution, what follows its last "####"."""
    return final_part(str(reference(task, config)))


def final_part(text: str) -> str:
    """The line that follows the last "####", or the whole text where there is none."""
    _, mark, part = text.rpartition(_MARK)
    return part.strip().partition("\n")[0].strip() if mark else part.strip()


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, if any."""
    found = _BOXED.findall(text)
    return found[-1].strip() if found else None


def last_number(text: str) -> tuple[Decimal, bool] | None:
    """The final number of a text, and whether a percent sign follows it.

    Looks in the last \\boxed{...} first, then for the number right after the last "####",
    then for the last of all. Reads thousands separators, currency signs, exponents and
    simple fractions.
    """
    marked = _NUMBER.search(final_part(text)) if _MARK in text else None
    boxes = list(_NUMBER.finditer(boxed(text) or ""))
    found = boxes[-1:] or ([marked] if marked else list(_NUMBER.finditer(text))[-1:])
    return _value(found[0]) if found else None


def lone_number(text: str) -> Decimal | None:
    """The number that is the whole text, or None."""
    match = _NUMBER.fullmatch(text.strip())
    found = _value(match) if match else None
    return found[0] if found else None


def same_number(answer: tuple[Decimal, bool], wanted: tuple[Decimal, bool]) -> bool:
    """Whether two numbers are equal to six decimals. "50%" equals both 50 and 0.5 unless
    both have the sign."""
    (a, a_percent), (b, b_percent) = answer, wanted
    if a_percent == b_percent:
        return _close(a, b)
    return _close(a, b) or (_close(a / 100, b) if a_percent else _close(a, b / 100))


def _close(a: Decimal, b: Decimal) -> bool:
    if a == a.to_integral_value() and b == b.to_integral_value():
        return a == b
    return abs(a - b) <= _CLOSE * min(Decimal(1), 100 * abs(b))


def _value(match: re.Match[str]) -> tuple[Decimal, bool] | None:
    """None where the number is beyond all bounds, or divided by zero."""
    digits = match["digits"].replace(",", "") + (match["exponent"] or "")
    try:
        value = Decimal(digits)
        if match["below"]:
            value /= Decimal(match["below"])
    except decimal.DecimalException:
        return None
    if match["sign"] in ("-", "\u2212"):
        value = -value
    return value, bool(match["percent"])
