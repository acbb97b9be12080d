"""What counts as a workflow, and what is said of what does not."""

from __future__ import annotations

from typing import Any

import pytest

from astuner.errors import UserCodeError
from astuner.task_runner import Workflow, check_workflow
from astuner.task_runner.workflow import declared_targets


class Good(Workflow):
    trainable_targets: list[str] | None = ["solver"]  # noqa: RUF012

    async def execute(self, workflow_task: Any, tuner: Any) -> Any: ...


class OtherNames(Workflow):
    def execute(self, task: Any, model: Any, extra: int = 3) -> Any: ...


class NoExecute(Workflow):
    pass


class WrongArguments(Workflow):
    async def execute(self, workflow_task: Any) -> Any: ...


class NeedsArguments(Workflow):
    depth: int

    async def execute(self, workflow_task: Any, tuner: Any) -> Any: ...


class NotAWorkflow:
    async def execute(self, workflow_task: Any, tuner: Any) -> Any: ...


def test_good_ones_pass() -> None:
    assert check_workflow(Good) is Good
    assert check_workflow(OtherNames) is OtherNames


@pytest.mark.parametrize(
    ("obj", "says"),
    [
        (NoExecute, "NoExecute does not define execute"),
        (WrongArguments, r"WrongArguments.execute.* must take \(self, workflow_task, tuner\)"),
        (NeedsArguments, "fields without a default: depth"),
        (NotAWorkflow, "is not a subclass of astuner.Workflow"),
        (Good(), "pass the class itself"),
        (None, "None is not a subclass"),
        (Workflow, "does not define execute"),
    ],
)
def test_bad_ones_are_named_with_a_way_out(obj: Any, says: str) -> None:
    with pytest.raises(UserCodeError, match=says):
        check_workflow(obj)


def test_extra_attributes_belong_to_the_instance() -> None:
    one, other = Good(), Good()
    one.tools = ["calculator"]
    assert not hasattr(other, "tools")


def test_targets_of_class_and_instance() -> None:
    assert declared_targets(Good) == frozenset({"solver"})
    assert declared_targets(OtherNames) is None
    changed = Good()
    changed.trainable_targets = ["a", "b"]
    assert declared_targets(changed) == frozenset({"a", "b"})
    assert declared_targets(Good) == frozenset({"solver"})
