"""An agent of several turns in a Gymnasium environment: walk over a frozen lake.

The environment is `workflow_task.gym_env`, made for this episode and released after it. Each
turn the model reads what lies around it and answers with a move. Reaching the goal pays 1;
a small part is for answers that are nothing but a move and for the way that was made, so
that there is something to learn from before the first goal is reached.
"""

from __future__ import annotations

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask

SYSTEM_PROMPT = "Walk over the ice to the goal. Reply with just one word: left, down, right or up."
EXAMPLE = (
    ("left: edge, down: ice, right: hole, up: edge.", "down"),
    ("left: edge, down: hole, right: ice, up: ice.", "right"),
)
"""Two moves that the prompt shows, so that a small model answers with nothing else."""
MOVES = {"left", "down", "right", "up"}
MAX_TURNS = 6
FOR_MOVES, FOR_THE_WAY = 0.1, 0.3
"""What an episode earns, besides the 1 for the goal, when all its answers were a move and
nothing else, and when it came all the way (half of it for half of the way)."""


class FrozenLakeWorkflow(Workflow):
    name: str = "frozenlake"

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        client = tuner.as_raw_openai_sdk_client()
        env = workflow_task.gym_env
        observation, info = await env.reset()
        start = left = info.get("distance", 0)  # only the lake tells it
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *shown()]
        reward, moves, turns, done = 0.0, 0, 0, False
        while not done and turns < MAX_TURNS:
            messages.append(question(observation))
            reply = await client.chat.completions.create(model="tuned", messages=messages)
            answer = reply.choices[0].message.content or ""
            messages.append({"role": "assistant", "content": answer})
            observation, gained, terminated, truncated, info = await env.step(answer)
            reward += gained
            moves += answer.strip(" .\n").lower() in MOVES
            turns += 1
            done = terminated or truncated
            if gained or not terminated:  # whoever falls into a hole has come no further
                left = info.get("distance", 0)
        share, way = moves / turns, max(0.0, 1 - left / start) if start else 0.0
        return WorkflowOutput(
            reward=reward + FOR_MOVES * share + FOR_THE_WAY * way,
            is_success=reward > 0,
            metadata={"turns": turns, "moves": moves},
            log_metrics={"reached_goal": reward, "moves_share": share, "turns": float(turns)},
        )


def shown() -> list[dict[str, str]]:
    """The example, as if the model had walked so."""
    turns = ((question(seen), {"role": "assistant", "content": move}) for seen, move in EXAMPLE)
    return [message for turn in turns for message in turn]


def question(observation: object) -> dict[str, str]:
    return {"role": "user", "content": f"{observation} Your move?"}
