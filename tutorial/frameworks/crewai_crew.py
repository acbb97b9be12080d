"""CrewAI: a crew of one agent with one task, over CrewAI's own OpenAI client."""

from __future__ import annotations

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.frameworks.sums import SYSTEM, add, graded, multiply


class CrewAIWorkflow(Workflow):
    name: str = "crewai"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        endpoint = tuner.as_oai_baseurl_apikey(agent_name="solver")
        model = LLM(
            model=endpoint.model,
            provider="openai",
            base_url=endpoint.base_url,
            api_key=endpoint.api_key,
        )
        agent = Agent(
            role="solver",
            goal=SYSTEM,
            backstory="You like numbers.",
            llm=model,
            tools=[tool("add")(add), tool("multiply")(multiply)],
        )
        task = Task(
            description=workflow_task.main_query, expected_output="the numbers", agent=agent
        )
        answer = await Crew(agents=[agent], tasks=[task]).kickoff_async()
        return graded(answer.raw, workflow_task)
