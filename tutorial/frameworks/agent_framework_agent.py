"""Microsoft Agent Framework: an `Agent` over its chat completion client."""

from __future__ import annotations

from agent_framework import Agent
from agent_framework.openai import OpenAIChatCompletionClient

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.frameworks.sums import SYSTEM, add, graded, multiply


class AgentFrameworkWorkflow(Workflow):
    name: str = "agent_framework"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        endpoint = tuner.as_oai_baseurl_apikey(agent_name="solver")
        client = OpenAIChatCompletionClient(
            model=endpoint.model, base_url=endpoint.base_url, api_key=endpoint.api_key
        )
        agent = Agent(client, SYSTEM, name="solver", tools=[add, multiply])
        answer = await agent.run(workflow_task.main_query)
        return graded(answer.text, workflow_task)
