"""AutoGen: an `AssistantAgent` over `OpenAIChatCompletionClient`."""

from __future__ import annotations

from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.frameworks.sums import SYSTEM, add, graded, multiply

INFO = ModelInfo(
    vision=False,
    function_calling=True,
    json_output=False,
    structured_output=False,
    family="unknown",
)


class AutoGenWorkflow(Workflow):
    name: str = "autogen"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        endpoint = tuner.as_oai_baseurl_apikey(agent_name="solver")
        model = OpenAIChatCompletionClient(
            model=endpoint.model,
            base_url=endpoint.base_url,
            api_key=endpoint.api_key,
            model_info=INFO,
        )
        agent = AssistantAgent(
            "solver",
            model,
            tools=[add, multiply],
            system_message=SYSTEM,
            max_tool_iterations=5,
        )
        result = await agent.run(task=workflow_task.main_query)
        await model.close()
        return graded(result.messages[-1].content, workflow_task)
