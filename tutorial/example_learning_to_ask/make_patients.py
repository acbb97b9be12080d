"""Makes the visits: what a patient says first, and what is wrong with them.

`python -m tutorial.example_learning_to_ask.make_patients` writes the two files beside it.
The first words tell nothing: each comes with each illness. No opening is in both files.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from tutorial.example_learning_to_ask.patient import SIGNS

HERE = Path(__file__).parent
OPENINGS = {
    "train": (
        "I feel ill.", "I do not feel well.", "My head hurts.", "I feel weak.",
        "Something is wrong with me.", "I felt bad all day.", "I cannot get up.",
        "Everything hurts.", "I am not myself today.", "I feel dizzy.",
        "Please help me, I am sick.", "I had to stay at home.",
        "I have been unwell since Monday.", "My body aches.", "I feel terrible.",
        "I do not know what I have.",
    ),
    "validation": (
        "I am ill, doctor.", "I feel awful today.", "My head is spinning.", "I am in pain.",
        "What is wrong with me?", "I have felt sick for two days.", "I can hardly stand.",
        "I need your help.",
    ),
}  # fmt: skip


def visits(split: str) -> list[dict[str, str]]:
    return [
        {"task_id": f"{split}-{number}", "main_query": opening, "illness": illness}
        for number, (opening, illness) in enumerate(product(OPENINGS[split], SIGNS))
    ]


def main() -> None:
    for split in OPENINGS:
        text = "".join(json.dumps(visit) + "\n" for visit in visits(split))
        (HERE / f"patients_{split}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
