"""No framework: a loop of one's own over the anthropic SDK."""

from __future__ import annotations

from typing import Any

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.frameworks.sums import SCHEMAS, SYSTEM, TOOLS, graded

MAX_TURNS = 5


class AnthropicWorkflow(Workflow):
    name: str = "anthropic_loop"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_anthropic_sdk_client(agent_name="solver")
        tools: Any = [
            {"name": s["name"], "description": s["description"], "input_schema": s["parameters"]}
            for s in SCHEMAS
        ]
        messages: list[Any] = [{"role": "user", "content": workflow_task.main_query}]
        answer: Any = None
        for _ in range(MAX_TURNS):
            answer = await client.messages.create(
                model=tuner.model_name,
                max_tokens=400,
                system=SYSTEM,
                tools=tools,
                messages=messages,
            )
            if answer.stop_reason != "tool_use":
                break
            results = [
                {
                    "type": "tool_result",
                    "tool_use_id": block.id,
                    "content": str(TOOLS[block.name](**block.input)),
                }
                for block in answer.content
                if block.type == "tool_use"
            ]
            messages += [
                {"role": "assistant", "content": answer.content},
                {"role": "user", "content": results},
            ]
        text = "".join(block.text for block in answer.content if block.type == "text")
        return graded(text, workflow_task)
