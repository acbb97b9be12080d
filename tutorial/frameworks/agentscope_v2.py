"""AgentScope 2.x: an `Agent` with a Toolkit, on AgentScope's own model object."""

from __future__ import annotations

from agentscope.agent import Agent
from agentscope.message import TextBlock, UserMsg
from agentscope.permission import PermissionBehavior, PermissionDecision
from agentscope.tool import FunctionTool, ToolChunk, Toolkit

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.frameworks import sums

ALLOWED = PermissionDecision(PermissionBehavior.ALLOW, "nobody is there to be asked")


def add(a: int, b: int) -> ToolChunk:
    """Add two numbers."""
    return ToolChunk(content=[TextBlock(text=str(sums.add(a, b)))])


def multiply(a: int, b: int) -> ToolChunk:
    """Multiply two numbers."""
    return ToolChunk(content=[TextBlock(text=str(sums.multiply(a, b)))])


class AgentScopeWorkflow(Workflow):
    name: str = "agentscope_v2"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        agent = Agent(
            name="solver",
            system_prompt=sums.SYSTEM,
            model=tuner.as_agentscope_model(agent_name="solver"),
            toolkit=Toolkit(tools=[FunctionTool(f, permission=ALLOWED) for f in (add, multiply)]),
        )
        answer = await agent.reply(UserMsg("user", workflow_task.main_query))
        return sums.graded(answer.get_text_content(), workflow_task)
