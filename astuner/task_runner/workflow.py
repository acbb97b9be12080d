"""`Workflow`: the one class a user writes.

An agent is a subclass with an `execute`; any framework may be used inside it,
as long as its LLM calls go through the `tuner`. Every episode gets a fresh
instance and an event loop of its own. This module only says what a workflow is;
it runs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel, ConfigDict

from astuner.errors import UserCodeError
from astuner.types import WorkflowOutput, WorkflowTask

if TYPE_CHECKING:
    from astuner.model_tuner import ModelTuner

HOW_TO = (
    "Write:\n"
    "    class MyWorkflow(Workflow):\n"
    "        async def execute(self, workflow_task, tuner):\n"
    "            ...\n"
    "            return WorkflowOutput(reward=...)"
)


class Workflow(BaseModel):
    """An agent as astuner runs it: subclass this and write `execute`.

    A fresh instance is made for every episode, without arguments, so that
    attributes set on `self` belong to that episode alone. `execute` runs in its
    own thread and event loop: a client that is bound to an event loop should be
    created inside it, not at import time.
    """

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)

    name: str = ""
    trainable_targets: list[str] | None = None
    """Target tags whose calls are trained; None trains every call but those of targets that
    the configuration (`model.targets`) gives to somebody who is not trained."""

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        """Do the task once. A plain `def` is accepted too.

        Return a WorkflowOutput; its `reward` may stay None when the run has a judge.
        Whatever is raised here ends this episode only.
        """
        raise NotImplementedError(f"{type(self).__name__} has no execute(). {HOW_TO}")


def check_workflow(obj: Any) -> type[Workflow]:
    """The object itself, if the runner can run it.

    Raises UserCodeError when it is not a Workflow class, has no `execute`, has one
    that does not take (workflow_task, tuner), or cannot be built without arguments.
    """
    if not (inspect.isclass(obj) and issubclass(obj, Workflow)):
        instance = " (an instance: pass the class itself)" if isinstance(obj, Workflow) else ""
        raise UserCodeError(f"{obj!r} is not a subclass of astuner.Workflow{instance}. {HOW_TO}")
    name = obj.__qualname__
    if obj.execute is Workflow.execute:
        raise UserCodeError(f"{name} does not define execute(workflow_task, tuner). {HOW_TO}")
    signature = inspect.signature(obj.execute)
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise UserCodeError(
            f"{name}.execute{signature} must take (self, workflow_task, tuner): {error}. {HOW_TO}"
        ) from None
    required = [key for key, field in obj.model_fields.items() if field.is_required()]
    if required:
        raise UserCodeError(
            f"{name} has fields without a default: {', '.join(required)}. It is built without "
            "arguments for every episode, so give each field a default value."
        )
    return obj


def declared_targets(workflow: type[Workflow] | Workflow) -> frozenset[str] | None:
    """The trainable target tags, of a class by its default, of an instance as it is now."""
    if isinstance(workflow, Workflow):
        targets = workflow.trainable_targets
    else:
        targets = workflow.model_fields["trainable_targets"].get_default(call_default_factory=True)
    return None if targets is None else frozenset(cast(list[str], targets))


def trained_targets(
    declared: frozenset[str] | None, tags: Iterable[str], named: Mapping[str, bool]
) -> frozenset[str] | None:
    """Of the targets that an episode's calls were made for, those that are trained (None: all):
    what the workflow declared, without what the configuration names as untrained."""
    untrained = frozenset(tag for tag, trained in named.items() if not trained)
    if not untrained:
        return declared
    return (frozenset(tags) if declared is None else declared) - untrained
