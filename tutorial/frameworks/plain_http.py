"""No SDK at all: JSON over HTTP, as any language can send it."""

from __future__ import annotations

import json
from typing import Any
from urllib.request import Request, urlopen

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from tutorial.frameworks.sums import SCHEMAS, SYSTEM, TOOLS, graded

MAX_TURNS = 5


class PlainHTTPWorkflow(Workflow):
    name: str = "plain_http"

    def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        endpoint = tuner.as_oai_baseurl_apikey(agent_name="solver")
        tools = [{"type": "function", "function": schema} for schema in SCHEMAS]
        messages: list[Any] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": workflow_task.main_query},
        ]
        for _ in range(MAX_TURNS):
            request = Request(
                f"{endpoint.base_url}/chat/completions",
                json.dumps({"messages": messages, "tools": tools}).encode(),
                {
                    "Authorization": f"Bearer {endpoint.api_key}",
                    "Content-Type": "application/json",
                },
            )
            with urlopen(request, timeout=600) as answer:
                message = json.load(answer)["choices"][0]["message"]
            messages.append(message)
            for call in message.get("tool_calls", ()):
                function = call["function"]
                result = TOOLS[function["name"]](**json.loads(function["arguments"]))
                messages.append(
                    {"role": "tool", "tool_call_id": call["id"], "content": str(result)}
                )
            if not message.get("tool_calls"):
                break
        return graded(messages[-1]["content"], workflow_task)
