"""One night and one day of Werewolf, with an agent for every role.

At night the werewolf takes a victim; in the morning the seer tells a dream and the
werewolf accuses somebody; then all vote. Villagers vote by the model that is trained
(target "villager"); the werewolf asks the model too, under a target that is not
("werewolf"); the seer follows a script. A villager sees names and what was said, never
a role.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import Field

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask

RULES = "This is a game of Werewolf. The werewolf lies. The seer dreams of it and tells the truth."


@dataclass(frozen=True)
class Table:
    """Who sits there, and who is who."""

    players: Sequence[str]
    werewolf: str
    seer: str
    accused: str
    """By the werewolf, who must blame somebody."""
    seer_speaks_first: bool

    @property
    def prey(self) -> list[str]:
        return [name for name in self.players if name != self.werewolf]

    def talk(self, victim: str) -> str:
        """What is heard in the morning. A dead seer leaves a note."""
        accused = self.accused if self.accused != victim else self.someone_else(victim)
        dream = f"I had a dream: the werewolf is {self.werewolf}."
        note = f"{self.seer} is dead and left a note: {dream}"
        seer = note if victim == self.seer else f"{self.seer}: {dream}"
        lie = f"{self.werewolf}: I think that the werewolf is {accused}."
        lines = [seer, lie] if self.seer_speaks_first else [lie, seer]
        return "\n".join(lines)

    def someone_else(self, victim: str) -> str:
        """Whom the werewolf accuses when its first choice is dead."""
        return next(name for name in self.prey if name not in (victim, self.seer))


class WerewolfWorkflow(Workflow):
    """The game. `trainable_targets` says that only villagers learn."""

    name: str = "werewolves"
    trainable_targets: list[str] | None = Field(default=["villager"])

    async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        known = {k: v for k, v in workflow_task.metadata.items() if k in Table.__dataclass_fields__}
        table = Table(**known)
        victim = await self.night(table, tuner)
        alive = [name for name in table.players if name != victim]
        talk = table.talk(victim)
        villagers = [name for name in alive if name not in (table.werewolf, table.seer)]
        votes = {name: await self.vote(name, alive, talk, tuner) for name in villagers}
        won = is_caught(table, victim, list(votes.values()))
        return WorkflowOutput(
            reward={
                "villager": [worth(vote, table.werewolf, won) for vote in votes.values()],
                "werewolf": 0.0 if won else 1.0,
            },
            is_success=won,
            metadata={"victim": victim, "talk": talk, "votes": votes},
            log_metrics={
                "votes_that_count": mean(vote is not None for vote in votes.values()),
                "seer_killed": float(victim == table.seer),
            },
        )

    async def night(self, table: Table, tuner: ModelTuner) -> str:
        """The werewolf's choice, by a model that is not trained; the first at the table where
        it names nobody."""
        reply = await ask(
            tuner,
            "werewolf",
            f"You are the werewolf. The others are {', '.join(table.prey)}. "
            "Whom do you eat tonight? Reply with just one name.",
        )
        return named(reply, table.prey) or table.prey[0]

    async def vote(
        self, name: str, alive: Sequence[str], talk: str, tuner: ModelTuner
    ) -> str | None:
        """A villager's vote; None where the reply does not begin with another living player."""
        others = [player for player in alive if player != name]
        reply = await ask(
            tuner,
            "villager",
            f"{RULES}\n\n{talk}\n\nWho is the werewolf? Reply with just one name. You are {name}.",
            agent=name,
        )
        word = re.match(r"\w*", reply)
        return word[0] if word and word[0] in others else None


async def ask(tuner: ModelTuner, target: str, question: str, agent: str = "") -> str:
    """One call under this target tag; every player is an agent of its own."""
    client = tuner.as_raw_openai_sdk_client(agent_name=agent or target, target_tag=target)
    reply = await client.chat.completions.create(
        model="tuned", messages=[{"role": "user", "content": question}]
    )
    return (reply.choices[0].message.content or "").strip()


def named(reply: str, names: Sequence[str]) -> str | None:
    """The first of these names in the reply."""
    found = [(reply.find(name), name) for name in names if name in reply]
    return min(found)[1] if found else None


def is_caught(table: Table, victim: str, votes: Sequence[str | None]) -> bool:
    """Whether the werewolf got more votes than anybody else. The seer, if alive, votes for the
    werewolf, and the werewolf for whom it accused; a tie saves it."""
    counted = Counter(vote for vote in votes if vote is not None)
    counted[table.accused if table.accused != victim else table.someone_else(victim)] += 1
    if victim != table.seer:
        counted[table.werewolf] += 1
    others = (number for name, number in counted.items() if name != table.werewolf)
    return counted[table.werewolf] > max(others, default=0)


def worth(vote: str | None, werewolf: str, won: bool) -> float:
    """Of one vote: 0.1 for one that counts, 0.5 more for the right one, 0.4 more for winning."""
    right = vote == werewolf
    return 0.1 * (vote is not None) + 0.5 * right + 0.4 * (right and won)


def mean(values: Iterable[bool]) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)
