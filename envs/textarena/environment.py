"""TextArena's games: puzzles for one, and games for several against scripted opponents.

`params["game"]` is TextArena's id, e.g. "GuessTheNumber-v0" or "TicTacToe-v0"; what this file
does not know in `params` goes to `textarena.make`. `reset` shows the rules, every step what
happened since; rewards are the game's own and come at its end. The other players are
`params["opponent"]`: "random" plays a move that the game lists, "pkg.mod->Name" is yours.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from astuner.env.actions import marked_action
from astuner.env.protocol import Action, Info, action_text
from astuner.errors import EnvError, MissingDependency
from astuner.loading import ARROW, load_object

Opponent = Callable[[str], str]
"""From what it is shown to its move."""

_ONE_AT_A_TIME = threading.RLock()
_MOVE = re.compile(r"\[[^\[\]\n]+\]")
_LISTED = re.compile(r"(?:available|valid|legal|possible) (?:moves|actions)\b(.+)", re.I)


class Game:
    """One game, played from one of its seats."""

    def __init__(self, env: Any, *, seat: int, players: int, opponent: str) -> None:
        self._env = env
        self._seat = seat
        self._players = players
        """0 is as few as the game allows."""
        self._opponent = opponent
        self._brackets = False
        self._stream: Any = None
        """Where this game's random numbers stand."""
        self._seed = 0

    def reset(self, *, seed: int | None = None) -> tuple[str, Info]:
        self._seed = self._seed if seed is None else seed
        self._stream = random.Random(self._seed).getstate()
        self._move = _opponent(self._opponent, self._seed)
        with self._own_random_numbers():
            self._begin()
            shown = self._until_our_turn(False)
        return shown, {"players": self._env.state.num_players}

    def step(self, action: Action) -> tuple[str, float, bool, bool, Info]:
        said = action_text(action)
        with self._own_random_numbers():
            over = self._play(marked_action(said) or said)
            shown = self._until_our_turn(over)
            over = bool(self._env.state.done)
            rewards, facts = self._env.close() if over else (None, {})
        if not over:
            return shown, 0.0, False, False, {}
        told = dict((facts or {}).get(self._seat, {}))
        reason = str(told.get("reason") or "The game is over.")
        reward = float((rewards or {}).get(self._seat, 0.0))
        return "\n".join(filter(None, (shown, reason))), reward, True, False, told

    # ---------------------------------------------------------------- the game

    def _begin(self) -> None:
        for players in [self._players] if self._players else [1, 2]:
            try:
                self._env.reset(num_players=players, seed=self._seed)
            except (AssertionError, ValueError) as error:  # it takes another number
                refused = error
            else:
                return
        raise EnvError(f"{self._env.env_id} refused: {refused}. Set players.", cause="refused")

    def _play(self, move: str) -> bool:
        """Whether the game is over now. As TextArena's own wrapper does, a bare move is put into
        the brackets that the games read moves from."""
        done, _ = self._env.step(move if "[" in move else f"[{move.strip()}]")
        return bool(done)

    def _until_our_turn(self, over: bool) -> str:
        """Let the others play; what our seat is shown meanwhile."""
        while not over and self._env.state.current_player_id != self._seat:
            over = self._play(self._move(self._shown(self._env.state.current_player_id)))
        return self._shown(self._seat)

    def _shown(self, seat: int) -> str:
        """What was not shown to this seat yet, without its own words."""
        state = self._env.state
        new, state.observations[seat] = state.observations[seat], []
        return "\n".join(str(text) for sender, text, *_ in new if sender != seat).strip()

    @contextmanager
    def _own_random_numbers(self) -> Generator[None]:
        """The games draw from the process's one `random`: each gets its own stream of it, so that
        a seed means the same game whatever else is played, and the process gets its back."""
        with _ONE_AT_A_TIME:
            outside = random.getstate()
            random.setstate(self._stream)
            try:
                yield
            finally:
                self._stream = random.getstate()
                random.setstate(outside)


def make(task_id: str, params: dict[str, Any]) -> Game:
    """One game. Raises EnvError for one that does not exist or cannot be played here."""
    try:
        import textarena
        from textarena.envs.registration import ENV_REGISTRY
    except ImportError:
        raise MissingDependency("textarena", "textarena", "The environment textarena") from None
    options = {key: value for key, value in params.items() if key != "seed"}
    game = str(options.pop("game", "GuessTheNumber-v0"))
    seat, players = int(options.pop("player", 0)), int(options.pop("players", 0))
    opponent = str(options.pop("opponent", "random"))
    _opponent(opponent, 0)
    raw = f"{game}-raw"  # without TextArena's wrappers, which show the whole game at every turn
    if raw not in ENV_REGISTRY:
        known = sorted({name.partition("-v")[0] for name in ENV_REGISTRY})
        raise EnvError(f"TextArena has no {game!r}. It has: {', '.join(known)}.", cause="refused")
    try:
        env = textarena.make(raw, **options)
    except LookupError as error:
        raise EnvError(
            f"{game} needs word lists: python -m nltk.downloader words "
            f"averaged_perceptron_tagger_eng ({str(error).strip().splitlines()[-1]})",
            cause="refused",
        ) from None
    except (ImportError, SyntaxError, TypeError, ValueError, OSError) as error:
        told = f"TextArena cannot make {game} with {options}: {error}"
        raise EnvError(told, cause="refused") from None
    return Game(env, seat=seat, players=players, opponent=opponent)


def _opponent(name: str, seed: int) -> Opponent:
    if ARROW in name:
        return load_object(name, "opponent")
    if name != "random":
        raise EnvError(
            f"There is no opponent {name!r}: set random, or package.module{ARROW}Name of a "
            "function from what it is shown to its move.",
            cause="refused",
        )
    chance = random.Random(seed)
    return lambda shown: listed_move(shown, chance)


def listed_move(shown: str, chance: random.Random) -> str:
    """One of the moves that the game lists. Raises EnvError where it lists none."""
    lists = _LISTED.findall(shown)
    moves = _MOVE.findall(lists[-1]) if lists else []
    if not moves:
        raise EnvError(
            "This game lists no moves, so its opponent cannot be random: set "
            f"opponent to package.module{ARROW}Name of a function. It was shown: {shown[-300:]!r}",
            cause="refused",
        )
    return chance.choice(moves)
