"""LangChain and LangGraph: `create_agent` over `ChatOpenAI`."""

from __future__ import annotations

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.frameworks.sums import SYSTEM, add, graded, multiply


class LangGraphWorkflow(Workflow):
    name: str = "langgraph"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        endpoint = tuner.as_oai_baseurl_apikey(agent_name="solver")
        model = ChatOpenAI(
            model=endpoint.model, base_url=endpoint.base_url, api_key=endpoint.api_key
        )
        agent = create_agent(model, tools=[add, multiply], system_prompt=SYSTEM)
        question = {"role": "user", "content": workflow_task.main_query}
        state = await agent.ainvoke({"messages": [question]})
        return graded(state["messages"][-1].text, workflow_task)
