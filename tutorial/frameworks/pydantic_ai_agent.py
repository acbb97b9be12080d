"""pydantic-ai: an `Agent` over `OpenAIChatModel`."""

from __future__ import annotations

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.frameworks.sums import SYSTEM, add, graded, multiply


class PydanticAIWorkflow(Workflow):
    name: str = "pydantic_ai"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client(agent_name="solver")
        model = OpenAIChatModel(tuner.model_name, provider=OpenAIProvider(openai_client=client))
        agent = Agent(model, system_prompt=SYSTEM, tools=[add, multiply])
        result = await agent.run(workflow_task.main_query)
        return graded(result.output, workflow_task)
