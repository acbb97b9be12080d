"""smolagents: a `ToolCallingAgent` over `OpenAIModel`.

It ends by calling its own tool `final_answer`. It is synchronous, and so is `execute`:
each episode has a thread of its own.
"""

from __future__ import annotations

from smolagents import LogLevel, OpenAIModel, ToolCallingAgent, tool

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.frameworks.sums import SYSTEM, add, graded, multiply


class SmolagentsWorkflow(Workflow):
    name: str = "smolagents"

    def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        endpoint = tuner.as_oai_baseurl_apikey(agent_name="solver")
        model = OpenAIModel(endpoint.model, api_base=endpoint.base_url, api_key=endpoint.api_key)
        agent = ToolCallingAgent(
            tools=[tool(add), tool(multiply)],
            model=model,
            instructions=SYSTEM,
            verbosity_level=LogLevel.OFF,
        )
        return graded(agent.run(workflow_task.main_query), workflow_task)
