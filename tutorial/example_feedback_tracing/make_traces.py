"""Makes the log of a support desk's agent: tickets, where it sent them, what people thought.

`python -m tutorial.example_feedback_tracing.make_traces` writes `traces.jsonl` beside it. As
in a real log, tickets come again in other spelling, half of the replies are wrong, some were
never rated, and a monitor's pings stand between them. The same seed gives the same log.
"""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DESKS = ("billing", "delivery", "account", "repair")
SYSTEM = f"Which desk is this ticket for: {', '.join(DESKS)}? Reply with just one word."
EXAMPLES = (
    ("It says that I did not pay, but I did.", "billing"),
    ("It should have been here by now.", "delivery"),
    ("I do not know my user name any more.", "account"),
    ("It worked for a day, and then it stopped.", "repair"),
)
"""Stand in the agent's prompt, as turns."""
THINGS = ("the lamp", "my chair", "the kettle", "my bike", "the phone", "my order", "the toaster")
COMPLAINTS = {
    "billing": (
        "I was charged twice for {}.", "The invoice for {} is wrong.",
        "I want my money back for {}.", "Why did the price of {} go up?",
        "My card was refused when I paid for {}.",
    ),
    "delivery": (
        "{} has not arrived.", "The courier left {} in the rain.",
        "When will {} come?", "The parcel with {} is lost.", "I was not at home for {}.",
    ),
    "account": (
        "I cannot log in to see {}.", "I forgot my password and need {}.",
        "Change the name on my profile, not on {}.", "My login shows {} of a stranger.",
        "Delete my account and forget {}.",
    ),
    "repair": (
        "{} is broken.", "{} makes a strange noise.", "{} does not turn on.",
        "A part of {} fell off.", "There is a crack in {}.",
    ),
}  # fmt: skip
HABIT = {"billing": "billing", "delivery": "billing", "account": "account", "repair": "delivery"}
"""Where the agent that wrote the log used to send things."""


def ticket(complaint: str, thing: str) -> str:
    text = complaint.format(thing)
    return text[0].upper() + text[1:]


def trace(question: str, reply: str, feedback: str | None) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}]
    for asked, answer in (*EXAMPLES, (question, reply)):
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    return {
        "messages": messages,
        "feedback": feedback,
        "source": "app",
    }


def traces(source: random.Random) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for desk, complaints in COMPLAINTS.items():
        for complaint, thing in product(complaints, THINGS):
            question = ticket(complaint, thing)
            for reply in dict.fromkeys((HABIT[desk], source.choice(DESKS), desk)):
                opinion = "up" if reply == desk else "down"
                log.append(trace(question, reply, opinion))
                if source.random() < 0.2:
                    log.append(trace(question, reply, None))
                if source.random() < 0.2:
                    log.append(trace(question.upper() + "!", reply, opinion))
    for number in range(20):
        log.append(trace(f"ping {number}", "pong", "up") | {"source": "monitor"})
    source.shuffle(log)
    return log


def main() -> None:
    text = "".join(json.dumps(entry) + "\n" for entry in traces(random.Random("traces")))
    (HERE / "traces.jsonl").write_text(text)


if __name__ == "__main__":
    main()
