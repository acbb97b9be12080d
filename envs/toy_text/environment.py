"""Gymnasium's toy text games in words: FrozenLake, Taxi, Blackjack, CliffWalking.

`params["game"]` chooses; everything else in `params` goes to `gymnasium.make`, with one
addition: FrozenLake without a map gets a random one of `size` and `frozen` share that its
seed decides, always with a way to the goal; `brief` shows only what lies around. Its `info` has
the `distance` to the goal, in moves over an empty lake, where the map has one. Rules and rewards
are Gymnasium's own.
"""

from __future__ import annotations

from typing import Any

from astuner.env.gymnasium_text import GymnasiumText
from astuner.env.protocol import Action, Info, Observation
from astuner.errors import EnvError, MissingDependency

GAMES = {
    "FrozenLake": "FrozenLake-v1",
    "Taxi": "Taxi-v4",
    "Blackjack": "Blackjack-v1",
    "CliffWalking": "CliffWalking-v1",
}
CELLS = {b"F": "ice", b"S": "ice", b"H": "hole", b"G": "goal"}
LAKE_MOVES = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
CLIFF_MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}
PLACES = ("red", "green", "yellow", "blue")


def make(task_id: str, params: dict[str, Any]) -> GymnasiumText:
    """One game. Raises EnvError for one that does not exist."""
    try:
        import gymnasium
    except ImportError:
        raise MissingDependency("gymnasium", "env", "The environment toy_text") from None
    options = dict(params)
    game = str(options.pop("game", "FrozenLake"))
    if game not in GAMES:
        raise EnvError(f"There is no game {game!r}: {', '.join(GAMES)}.", cause="refused")
    seed, brief = options.pop("seed", None), bool(options.pop("brief", False))
    if game == "FrozenLake" and "desc" not in options and "map_name" not in options:
        options["desc"] = _random_map(options, seed)
    try:
        env = gymnasium.make(GAMES[game], **options)
    except (TypeError, gymnasium.error.Error) as error:
        raise EnvError(f"{game} refused {options}: {error}", cause="refused") from None
    if game == "FrozenLake":
        return FrozenLake(env, describe=frozen_lake_around if brief else frozen_lake)
    return GymnasiumText(env, describe=DESCRIBE[game])


class FrozenLake(GymnasiumText):
    """With the distance to the goal, where there is one, in `info`."""

    def reset(self, *, seed: int | None = None) -> tuple[Observation, Info]:
        observation, info = super().reset(seed=seed)
        return observation, {**info, **self._distance()}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, Info]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {**info, **self._distance()}

    def _distance(self) -> Info:
        desc = self.env.unwrapped.desc
        goal = _goal(desc)
        if goal is None:
            return {}
        row, column = divmod(int(self.env.unwrapped.s), desc.shape[1])
        return {"distance": abs(goal[0] - row) + abs(goal[1] - column)}


def _goal(desc: Any) -> tuple[int, int] | None:
    """Its row and column, the first one's where there are several; a map may have none."""
    rows, columns = (desc == b"G").nonzero()
    return (int(rows[0]), int(columns[0])) if len(rows) else None


def _random_map(options: dict[str, Any], seed: int | None) -> list[str]:
    from gymnasium.envs.toy_text.frozen_lake import generate_random_map

    size, share = int(options.pop("size", 4)), float(options.pop("frozen", 0.8))
    return generate_random_map(size=size, p=share, seed=seed)


def frozen_lake(env: Any, observation: Any) -> str:
    """Where one stands, where the goal is, and what lies around."""
    desc = env.unwrapped.desc
    row, column = divmod(int(observation), desc.shape[1])
    around = frozen_lake_around(env, observation)
    if desc[row, column] in (b"G", b"H"):
        return around
    goal = _goal(desc)
    where = "" if goal is None else f"; the goal is at row {goal[0]}, column {goal[1]}"
    return f"You are at row {row}, column {column}{where}. {around}"


def frozen_lake_around(env: Any, observation: Any) -> str:
    """What lies around, or how it ended: few tokens a turn."""
    desc = env.unwrapped.desc
    rows, columns = desc.shape
    row, column = divmod(int(observation), columns)
    if desc[row, column] == b"G":
        return "You reached the goal."
    if desc[row, column] == b"H":
        return "You fell into a hole."
    around = (
        f"{move}: {CELLS[desc[row + down, column + right]]}"
        if 0 <= row + down < rows and 0 <= column + right < columns
        else f"{move}: edge"
        for move, (down, right) in LAKE_MOVES.items()
    )
    return f"{', '.join(around)}."


def cliff_walking(env: Any, observation: Any) -> str:
    """The grid is 4 x 12; the cliff is the bottom row between start and goal."""
    row, column = divmod(int(observation), 12)
    if (row, column) == (3, 11):
        return "You reached the goal."

    def cell(r: int, c: int) -> str:
        if not (0 <= r < 4 and 0 <= c < 12):
            return "edge"
        if r == 3 and 0 < c < 11:
            return "cliff"
        return "goal" if (r, c) == (3, 11) else "ground"

    around = ", ".join(f"{m}: {cell(row + d, column + r)}" for m, (d, r) in CLIFF_MOVES.items())
    return f"You are at row {row}, column {column}; the goal is at row 3, column 11. {around}."


def taxi(env: Any, observation: Any) -> str:
    """The places' positions, the taxi, the passenger and the walls around the taxi."""
    row, column, passenger, destination = env.unwrapped.decode(int(observation))
    spots = ", ".join(
        f"{name} at row {r}, column {c}"
        for name, (r, c) in zip(PLACES, env.unwrapped.locs, strict=True)
    )
    where = "in the taxi" if passenger == 4 else f"at {PLACES[passenger]}"
    desc = env.unwrapped.desc
    walls = [
        side
        for side, blocked in (
            ("south", row == 4),
            ("north", row == 0),
            ("east", desc[1 + row, 2 * column + 2] != b":"),
            ("west", desc[1 + row, 2 * column] != b":"),
        )
        if blocked
    ]
    return (
        f"Places: {spots}. The taxi is at row {row}, column {column}; the passenger is {where} and "
        f"wants to go to {PLACES[destination]}. Walls: {', '.join(walls) or 'none'}."
    )


def blackjack(env: Any, observation: Any) -> str:
    """The sum of one's own cards, the dealer's card, and whether an ace counts as 11."""
    own, dealer, ace = (int(value) for value in observation)
    return (
        f"Your cards sum to {own}{' with an ace counted as 11' if ace else ''}; "
        f"the dealer shows {'an ace' if dealer == 1 else dealer}. Do you hit or stick?"
    )


DESCRIBE = {
    "Taxi": taxi,
    "Blackjack": blackjack,
    "CliffWalking": cliff_walking,
}
