"""Makes the games that are played: who sits where, and who is who.

`python -m tutorial.example_werewolves.make_games` writes the two files beside it. The
same seed gives the same games.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Greta", "Hugo", "Ida", "Jack")
HERE = Path(__file__).parent
SPLITS = {"train": 256, "validation": 64}


def game(random: random.Random) -> dict[str, object]:
    """Five players at a table; the first drawn is the werewolf, the second the seer."""
    players = random.sample(NAMES, 5)
    werewolf, seer, *villagers = players
    random.shuffle(players)
    return {
        "main_query": "Play a night and a day of Werewolf.",
        "players": players,
        "werewolf": werewolf,
        "seer": seer,
        "accused": random.choice(villagers),
        "seer_speaks_first": random.random() < 0.5,
    }


def main() -> None:
    for split, number in SPLITS.items():
        source = random.Random(f"werewolves {split}")
        rows = [{"task_id": f"{split}-{n}", **game(source)} for n in range(number)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (HERE / f"games_{split}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
