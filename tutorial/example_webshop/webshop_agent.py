"""A customer in WebShop: search, look at what was found, choose, buy.

The shop is `workflow_task.gym_env`, made for this episode and released after it. Each turn
the model reads a page and answers with one action; a purchase ends the visit and pays what the
shop says that it is worth, from 0 to 1. A reply that is no action ends it too, and so do
`env.params.max_steps`. One visit is shown, because a small model does not guess the form; a
small part of the reward is for the pages on the way to a purchase, whatever is bought.
"""

from __future__ import annotations

from typing import Any

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask

SYSTEM_PROMPT = "Buy what the instruction asks for. Reply with one action, as the page shows it."
SHOWN = (
    "Instruction:\ni need a desk fan with two speeds, color white, and price lower than 30.00 "
    "dollars\nsearch[words]",
    "search[desk fan two speeds white]",
    "click[b7kd02mx4t]\nHarlo Desk Fan, Two Speeds\n$24.50",
    "click[b7kd02mx4t]",
    "color: click[black] click[white]\nHarlo Desk Fan, Two Speeds\nPrice: $24.50\nclick[buy now]",
    "click[white]",
    "color: click[black] click[white] (chosen)\nHarlo Desk Fan, Two Speeds\nPrice: $24.50\n"
    "click[buy now]",
    "click[buy now]",
)
"""Pages and what the customer does with them, by turns."""
STAGES = ("search", "results", "item", "end")
"""The pages on the way to a purchase."""
FOR_STAGE = 0.05
"""What a visit earns for each that it came to, besides what its purchase is worth."""


class WebShopWorkflow(Workflow):
    name: str = "webshop"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        env = workflow_task.gym_env
        messages: list[Any] = [{"role": "system", "content": SYSTEM_PROMPT}]
        for page, action in zip(SHOWN[::2], SHOWN[1::2], strict=True):
            messages += [
                {"role": "user", "content": page},
                {"role": "assistant", "content": action},
            ]
        page, _ = await env.reset()
        worth, turns, stage, done = 0.0, 0, 0, False
        while not done:
            messages.append({"role": "user", "content": page})
            reply = await client.chat.completions.create(model="tuned", messages=messages)
            answer = reply.choices[0].message.content or ""
            messages.append({"role": "assistant", "content": answer})
            page, worth, bought, truncated, info = await env.step(answer)
            stage = max(stage, STAGES.index(info["page"]))
            turns += 1
            done = bought or truncated or info.get("invalid_action", False)
        return WorkflowOutput(
            reward=worth + FOR_STAGE * stage,
            is_success=worth == 1.0,
            metadata={"turns": turns, "reached": STAGES[stage], "worth": worth},
            log_metrics={"worth": worth, "stage": float(stage), "turns": float(turns)},
        )
