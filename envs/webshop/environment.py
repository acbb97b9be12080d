"""WebShop: find and buy what an instruction asks for, by search[...] and click[...].

Pages, actions, goals and the reward are those of Yao et al. 2022 (arXiv 2207.01206);
`params["data"]` is a folder with its files, without it the shop has made products in the same
format. Catalogue and search index are made once in a process and shared by all instances.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astuner.env.actions import marked_action
from astuner.env.protocol import Action, Info, action_text
from astuner.errors import EnvError, MissingDependency

from . import pages
from .catalogue import Catalogue, Goal, Product, build_catalogue, read_catalogue
from .generator import make_items
from .pages import Page
from .search import Search

MADE_PRODUCTS = 1000
_ACTION = re.compile(r"(search|click)\s*\[([^\[\]]+)\]", re.IGNORECASE)
_SPLITS = {"train": "train", "validation": "dev", "val": "dev", "dev": "dev", "test": "test"}


@dataclass(frozen=True, slots=True)
class Shop:
    """What all instances share."""

    catalogue: Catalogue
    search: Search


_shops: dict[tuple[str, int, str], Shop] = {}
_opening = threading.Lock()


def shop(data: str, num_products: int, goals: str) -> Shop:
    """Opened once; who comes meanwhile waits. Raises EnvError or MissingDependency."""
    if goals not in ("human", "synthetic"):
        raise EnvError(f"There are no goals {goals!r}: human or synthetic.", cause="refused")
    human = goals == "human"
    with _opening:
        key = (data, num_products, goals)
        if key not in _shops:
            if data:
                catalogue = read_catalogue(Path(data).expanduser(), num_products, human)
            else:
                made = make_items(num_products or MADE_PRODUCTS)
                catalogue = build_catalogue(*made, human=human)
            _shops[key] = Shop(catalogue, Search(list(catalogue.products.values())))
        return _shops[key]


class Visit:
    """One customer with one goal."""

    def __init__(
        self,
        shop: Shop,
        goal_of: Callable[[int], Goal],
        score: Callable[[Product, list[str], Goal], Any],
        *,
        sub_pages: tuple[str, ...],
        page_size: int,
        observation: str,
        max_steps: int,
    ) -> None:
        self._shop = shop
        self._goal_of = goal_of
        self._score = score
        self._sub_pages = sub_pages
        self._page_size = page_size
        self._observation = observation
        self._max_steps = max_steps
        self._seed = 0

    def reset(self, *, seed: int | None = None) -> tuple[str, Info]:
        self._seed = self._seed if seed is None else seed
        self._goal = self._goal_of(self._seed)
        self._steps = 0
        self._start()
        return self._shown(), self._info()

    def step(self, action: Action) -> tuple[str, float, bool, bool, Info]:
        self._steps += 1
        said = action_text(action)
        marked = marked_action(said)
        tried = _ACTION.findall(said if marked is None else marked)
        name, words = (tried[-1][0].lower(), tried[-1][1].strip().lower()) if tried else ("", "")
        if name == "click" and words == pages.BUY.lower() and words in pages.clickable(self._page):
            return self._buy()
        done = self._act(name, words)
        shown = self._shown()
        if not done and self._observation != "separated":
            shown = f"That is no action here.\n{shown}"
        info = self._info() if done else {**self._info(), "invalid_action": True}
        return shown, 0.0, False, self._steps >= self._max_steps, info

    def get_info(self) -> dict[str, Any]:
        return self._info()

    # ---------------------------------------------------------------- walking about

    def _act(self, name: str, words: str) -> bool:
        """Whether that is an action here."""
        if name == "search" and words:
            self._found = self._shop.search.find(words)
            self._results(1)
        elif name == "click" and words in (can := pages.clickable(self._page)):
            self._click(can[words])
        else:
            return False
        return True

    def _click(self, piece: pages.Piece) -> None:
        product = self._product
        if piece.text == pages.BACK:
            self._start()
        elif piece.text == pages.NEXT:
            self._results(self._number + 1)
        elif piece.text == pages.PREVIOUS and self._in_sub_page and product is not None:
            self._item(product)
        elif piece.text == pages.PREVIOUS:
            self._results(self._number - (product is None))
        elif piece.option and product is not None:
            self._chosen[piece.option] = piece.text
            self._item(product)
        elif product is None:
            self._item(self._shop.catalogue.products[piece.text])
        else:
            self._page = pages.sub_page(self._goal.instruction, product, piece.text)
            self._in_sub_page = True

    def _start(self) -> None:
        self._found: list[Product] = []
        self._results(1)
        self._page: Page = pages.search_page(self._goal.instruction)

    def _results(self, number: int) -> None:
        """Another product means other options."""
        self._number = number
        self._product: Product | None = None
        self._chosen: dict[str, str] = {}
        self._in_sub_page = False
        found, size = self._found, self._page_size
        self._page = pages.results_page(self._goal.instruction, found, number, size)

    def _item(self, product: Product) -> None:
        self._product, self._in_sub_page = product, False
        self._page = pages.item_page(self._goal.instruction, product, self._sub_pages)

    def _buy(self) -> tuple[str, float, bool, bool, Info]:
        assert self._product is not None
        got = self._score(self._product, list(self._chosen.values()), self._goal)
        self._page = pages.end_page(got.reward)
        told = {
            "page": "end",
            "asin": self._product.asin,
            "type": got.type,
            "attributes": got.attributes,
            "options": got.options,
            "price": got.price,
        }
        return self._shown(), got.reward, True, False, told

    def _shown(self) -> str:
        if self._observation == "separated":
            return pages.as_separated(self._page)
        shown_as = pages.as_brief if self._observation == "brief" else pages.as_lines
        return shown_as(self._page, self._chosen)

    def _info(self) -> Info:
        """What can be done on this page; searching always can, as in the original."""
        clicks = [f"click[{words}]" for words in pages.clickable(self._page)]
        page = "item" if self._product else "results" if self._found else "search"
        return {"page": page, "available_actions": ["search[<words>]", *clicks]}


def make(task_id: str, params: dict[str, Any]) -> Visit:
    """One visit. Raises EnvError for parameters or files that do not fit."""
    try:
        from .reward import nouns_by, score
    except ImportError:
        raise MissingDependency("rapidfuzz", "webshop", "The environment webshop") from None
    options = {key: value for key, value in params.items() if key != "seed"}
    begin = re.split(r"[^a-z]", task_id.lower())[0]
    split = str(options.pop("split", _SPLITS.get(begin, "train")))
    opened = shop(
        str(options.pop("data", "")),
        _whole(options, "num_products", 0, least=0),
        str(options.pop("goals", "human")),
    )
    number = options.pop("goal", None)
    goals = opened.catalogue.split(split) if number is None else opened.catalogue.goals
    if not goals or (number is not None and not 0 <= int(number) < len(goals)):
        raise EnvError(f"There are {len(goals)} goals; goal is {number}.", cause="refused")
    nouns = nouns_by(str(options.pop("nouns", "words")))
    attributes = (pages.ATTRIBUTES,) if options.pop("show_attributes", False) else ()
    observation = str(options.pop("observation", "lines"))
    page_size = _whole(options, "page_size", pages.PAGE_SIZE, least=1)
    max_steps = _whole(options, "max_steps", 50, least=1)
    if options or observation not in ("lines", "brief", "separated"):
        raise EnvError(
            f"webshop does not know {options or {'observation': observation}}; see its README.",
            cause="refused",
        )
    return Visit(
        opened,
        lambda seed: goals[seed % len(goals) if number is None else int(number)],
        lambda product, chosen, goal: score(product, chosen, goal, nouns),
        sub_pages=(*pages.SUB_PAGES, *attributes),
        page_size=page_size,
        observation=observation,
        max_steps=max_steps,
    )


def _whole(options: dict[str, Any], name: str, default: int, *, least: int) -> int:
    """Taken out of the options. Raises EnvError for anything else."""
    value = options.pop(name, default)
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = least - 1
    if number < least:
        raise EnvError(
            f"{name} is {value!r}; it must be a whole number from {least} on.", cause="refused"
        )
    return number
