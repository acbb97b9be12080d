"""An agent of several turns in a Gymnasium environment: walk over a frozen lake.

The environment is `workflow_task.gym_env`, made for this episode and released after it. Each
turn the model reads where it stands and answers with a move. Reaching the goal pays 1;
a small part is for answers that are moves at all, so that there is something to learn from
before the first goal is reached.
"""

from __future__ import annotations

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask

SYSTEM_PROMPT = "Walk over the ice to the goal. Answer with one move: left, down, right or up."
MAX_TURNS = 6
FOR_MOVES = 0.1
"""What an episode earns when all its answers were moves, besides the 1 for the goal."""


class FrozenLakeWorkflow(Workflow):
    name: str = "frozenlake"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        env = workflow_task.gym_env
        observation, _ = await env.reset()
        messages = [{"role": "system", "content": SYSTEM_PROMPT}]
        reward, moves, turns, done = 0.0, 0, 0, False
        while not done and turns < MAX_TURNS:
            messages.append({"role": "user", "content": f"{observation} Your move?"})
            reply = await client.chat.completions.create(model="tuned", messages=messages)
            answer = reply.choices[0].message.content or ""
            messages.append({"role": "assistant", "content": answer})
            observation, gained, terminated, truncated, info = await env.step(answer)
            reward += gained
            moves += not info.get("invalid_action", False)
            turns += 1
            done = terminated or truncated
        share = moves / turns
        return WorkflowOutput(
            reward=reward + FOR_MOVES * share,
            is_success=reward > 0,
            metadata={"turns": turns, "moves": moves},
            log_metrics={"reached_goal": reward, "moves_share": share, "turns": float(turns)},
        )
