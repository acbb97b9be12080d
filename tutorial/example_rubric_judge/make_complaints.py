"""Makes the customers' letters.

`python -m tutorial.example_rubric_judge.make_complaints` writes the two files beside it; no
complaint is in both.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva")
COMPLAINTS = {
    "train": (
        "My order is late.", "The app crashes.", "I was charged twice.", "My parcel is wet.",
        "I cannot log in.", "The lamp is broken.", "The chair is too small.",
        "Nobody answers the phone.", "The courier was rude.", "My voucher does not work.",
        "The kettle leaks.", "You sent the wrong book.",
    ),
    "validation": (
        "The bike has no brakes.", "My invoice is wrong.", "The box was empty.",
        "The website is down.", "My seat was taken.",
    ),
}  # fmt: skip


def letters(split: str) -> list[dict[str, str]]:
    return [
        {"task_id": f"{split}-{number}", "main_query": f"{complaint} {name}"}
        for number, (complaint, name) in enumerate(product(COMPLAINTS[split], NAMES))
    ]


def main() -> None:
    for split in COMPLAINTS:
        text = "".join(json.dumps(letter) + "\n" for letter in letters(split))
        (HERE / f"complaints_{split}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
