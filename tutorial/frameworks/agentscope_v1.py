"""AgentScope 1.0.x: a `ReActAgent`, on AgentScope's own model object."""

from __future__ import annotations

from agentscope.agent import ReActAgent
from agentscope.formatter import OpenAIChatFormatter
from agentscope.message import Msg, TextBlock
from agentscope.tool import Toolkit, ToolResponse

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.frameworks import sums


def add(a: int, b: int) -> ToolResponse:
    """Add two numbers.

    Args:
        a (int): one number
        b (int): the other
    """
    return ToolResponse(content=[TextBlock(type="text", text=str(sums.add(a, b)))])


def multiply(a: int, b: int) -> ToolResponse:
    """Multiply two numbers.

    Args:
        a (int): one number
        b (int): the other
    """
    return ToolResponse(content=[TextBlock(type="text", text=str(sums.multiply(a, b)))])


class ReActWorkflow(Workflow):
    name: str = "agentscope_v1"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        toolkit = Toolkit()
        for tool in (add, multiply):
            toolkit.register_tool_function(tool)
        agent = ReActAgent(
            name="solver",
            sys_prompt=sums.SYSTEM,
            model=tuner.as_agentscope_model(agent_name="solver"),
            formatter=OpenAIChatFormatter(),
            toolkit=toolkit,
            parallel_tool_calls=True,
        )
        agent.set_console_output_enabled(False)
        answer = await agent(Msg("user", workflow_task.main_query, "user"))
        return sums.graded(answer.get_text_content(), workflow_task)
