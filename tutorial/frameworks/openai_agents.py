"""OpenAI Agents SDK: an `Agent` with function tools, over the Responses API."""

from __future__ import annotations

from agents import Agent, OpenAIResponsesModel, RunConfig, Runner, function_tool

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.frameworks.sums import SYSTEM, add, graded, multiply


class OpenAIAgentsWorkflow(Workflow):
    name: str = "openai_agents"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client(agent_name="solver")
        agent = Agent(
            name="solver",
            instructions=SYSTEM,
            model=OpenAIResponsesModel(model=tuner.model_name, openai_client=client),
            tools=[function_tool(add), function_tool(multiply)],
        )
        # Traces would go to OpenAI.
        quiet = RunConfig(tracing_disabled=True)
        result = await Runner.run(agent, workflow_task.main_query, run_config=quiet)
        return graded(result.final_output, workflow_task)
