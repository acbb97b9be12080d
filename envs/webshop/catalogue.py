"""The shop's products and goals, from files in WebShop's own format.

`items_shuffle*.json` is a list of products as they were scraped, `items_ins_v2*.json` has
their attributes and synthetic instructions, `items_human_ins.json` the instructions that
people wrote. Prices within a range, price limits and the goals' order are drawn from one
fixed seed, so the same files give the same shop everywhere. Nothing is searched or scored here.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from astuner.errors import EnvError

SEED = 233
NO_PRICE = 100.0
NO_LIMIT = 1_000_000.0
LIMITS = tuple(10.0 * i for i in range(1, 100))
"""Price limits that instructions name, in dollars."""
LIMITS_ABOVE = 4
"""A goal's limit is one of so many that lie above the price."""
LONGEST_ASIN = 10
PATH_MARK = "\u203a"
"""Between the parts of a product category: "Beauty > Hair Care", with an angle quotation mark."""

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Product:
    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    attributes: tuple[str, ...]
    category: str
    query: str
    """The search that it was found with when the shop was scraped."""
    product_category: str
    """The path to it, its parts divided by PATH_MARK."""
    price: float
    price_tag: str
    """What the pages show: a price or a range."""
    options: Mapping[str, tuple[str, ...]]

    @property
    def searched_text(self) -> str:
        options = ", and ".join(f"{name}: {', '.join(v)}" for name, v in self.options.items())
        first = self.bullets[0] if self.bullets else ""
        return " ".join((self.title, self.description, first, options)).lower()


@dataclass(frozen=True, slots=True)
class Goal:
    instruction: str
    product: Product
    """Whose instruction it is; others may be as good."""
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    price_limit: float


@dataclass(frozen=True, slots=True)
class Catalogue:
    products: Mapping[str, Product]
    """By asin."""
    goals: tuple[Goal, ...]

    def split(self, name: str) -> tuple[Goal, ...]:
        """As in the paper's code the first 500 goals are the test set and the next 1,000 the
        development set; in a small catalogue an eighth each."""
        eighth = len(self.goals) // 8
        test = min(500, eighth)
        dev = test + min(1000, eighth)
        parts = {"test": self.goals[:test], "dev": self.goals[test:dev], "train": self.goals[dev:]}
        if name not in parts:
            raise EnvError(f"There is no split {name!r}: train, dev or test.", cause="refused")
        return parts[name]


def read_catalogue(folder: Path, limit: int, human: bool) -> Catalogue:
    """From the files in a folder; where there are several sizes, the largest. Raises EnvError."""
    items = _read(folder, "items_shuffle*.json")
    attributes = _read(folder, "items_ins_v2*.json")
    people = _read(folder, "items_human_ins*.json") if human else {}
    return build_catalogue(items[:limit] if limit else items, attributes, people, human=human)


def build_catalogue(
    items: Sequence[Json], attributes: Json, people: Json, *, human: bool
) -> Catalogue:
    """From what the three files hold. Raises EnvError when no goal is left."""
    draw = random.Random(SEED)
    known = {asin: _list(facts.get("attributes")) for asin, facts in attributes.items()}
    products: dict[str, Product] = {}
    for item in items:
        asin = str(item["asin"])
        if asin != "nan" and len(asin) <= LONGEST_ASIN and asin not in products:
            products[asin] = _product(item, known.get(asin) or ("DUMMY_ATTR",), draw)
    goals = list(
        _human_goals(products, people, draw) if human else _made_goals(products, attributes, draw)
    )
    if not goals:
        kind = "items_human_ins.json" if human else "items_ins_v2.json"
        raise EnvError(
            f"None of the {len(products)} products has an instruction in {kind}. Set goals to "
            f"{'synthetic' if human else 'human'}, or num_products to more.",
            cause="refused",
        )
    draw.shuffle(goals)
    return Catalogue(products, tuple(goals))


def _read(folder: Path, pattern: str) -> Any:
    files = sorted(folder.glob(pattern), key=lambda path: path.stat().st_size)
    if not files:
        raise EnvError(
            f"There is no {pattern} in {folder.resolve()}. Get WebShop's files as its README says "
            "(github.com/princeton-nlp/WebShop, setup.sh), or leave data empty for made ones.",
            cause="refused",
        )
    return json.loads(files[-1].read_text(encoding="utf-8"))


# ---------------------------------------------------------------- products


def _product(item: Json, attributes: tuple[str, ...], draw: random.Random) -> Product:
    price, tag = _price(item.get("pricing"), draw)
    return Product(
        asin=str(item["asin"]),
        title=str(item["name"]),
        description=str(item.get("full_description") or ""),
        bullets=_list(item.get("small_description")),
        attributes=attributes,
        category=str(item["category"]),
        query=str(item["query"]).lower().strip(),
        product_category=str(item["product_category"]),
        price=price,
        price_tag=tag,
        options=_options(item.get("customization_options") or {}),
    )


def _price(pricing: str | None, draw: random.Random) -> tuple[float, str]:
    """The price and what is shown; a product of a price range costs something within it."""
    told = [float(re.sub(r"[^\d.]", "", part)) for part in (pricing or "").split("$")[1:]][:2]
    if not told:
        return NO_PRICE, f"${NO_PRICE}"
    if len(told) == 1:
        return told[0], f"${told[0]}"
    return draw.uniform(*told), f"${told[0]} to ${told[1]}"


def _options(given: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {
        name.lower(): tuple(
            str(choice["value"]).strip().replace("/", " | ").lower() for choice in choices
        )
        for name, choices in given.items()
        if choices is not None
    }


def _list(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(str(part) for part in value) if isinstance(value, list) else (str(value),)


# ---------------------------------------------------------------- goals


def _human_goals(
    products: Mapping[str, Product], people: Json, draw: random.Random
) -> Iterable[Goal]:
    for asin, product in products.items():
        for told in people.get(asin, ()):
            attributes = _list(told.get("instruction_attributes"))
            if attributes:
                limit, words = _limit(product.price, draw)
                text = str(told["instruction"]).strip(".") + words
                options = told.get("instruction_options") or []
                wanted = options.values() if isinstance(options, Mapping) else options
                yield Goal(text, product, attributes, tuple(map(str, wanted)), limit)


def _made_goals(
    products: Mapping[str, Product], attributes: Json, draw: random.Random
) -> Iterable[Goal]:
    """One for each combination of the product's options."""
    for asin, product in products.items():
        told = attributes.get(asin) or {}
        wanted = _list(told.get("instruction_attributes"))
        if not told.get("instruction") or not wanted:
            continue
        limit, words = _limit(product.price, draw)
        names = sorted(product.options)
        for values in itertools.product(*(product.options[name] for name in names)):
            chosen = ", and ".join(f"{n}: {v}" for n, v in zip(names, values, strict=True))
            text = f"{told['instruction']}{f' with {chosen}' if chosen else ''}{words}"
            yield Goal(text, product, wanted, values, limit)


def _limit(price: float, draw: random.Random) -> tuple[float, str]:
    """A limit above the price, and how an instruction says it; none for the dearest."""
    above = [limit for limit in LIMITS if limit > price][:LIMITS_ABOVE]
    if len(above) < 2:
        return NO_LIMIT, ""
    limit = max(draw.sample(above, 2))
    return limit, f", and price lower than {limit:.2f} dollars"
