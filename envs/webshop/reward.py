"""What a purchase is worth: WebShop's reward, from 0 to 1.

Yao et al. 2022 (arXiv 2207.01206), section 3: with the wanted attributes U_att, options U_opt
and price limit u, and a bought product with Y_att, Y_opt and price y,

    r = r_type * (|U_att & Y_att| + |U_opt & Y_opt| + 1[y <= u]) / (|U_att| + |U_opt| + 1)

where r_type lowers the reward of another kind of product. What counts as a match (fuzzy
words, colours by their name) is that of the authors' code. Pure functions, but for spaCy's
model, which is asked for the nouns of a title if so configured.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfuzz import fuzz
from rapidfuzz.utils import default_process

from astuner.errors import EnvError

from .catalogue import PATH_MARK, Goal, Product

MATCH = 85
"""Percent that two phrases must share more than, to be the same."""
_COLOURS = """
alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown
burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac
copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold granite
grape graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon leopard light
lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard natural navy
nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell
silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut
wheat white wine yellow
"""
COLOURS = _COLOURS.split()
"""The first that occurs in an option stands for it."""
_FUNCTION_WORDS = """
a an and as at by for from in into is it its of on or per that the this to up use with you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())

Nouns = Callable[[str], list[str]]


@dataclass(frozen=True, slots=True)
class Score:
    reward: float
    type: float
    """The factor r_type."""
    attributes: int
    """How many of those wanted were got; likewise the options."""
    options: int
    price: bool
    """Whether it is within the limit."""


def score(product: Product, chosen: Sequence[str], goal: Goal, nouns: Nouns) -> Score:
    """What buying this product with these options is worth."""
    kind = type_factor(product, goal.product, nouns)
    attributes = attribute_matches(product, goal.attributes)
    options = option_matches(chosen, goal.options)
    price = product.price <= goal.price_limit
    wanted = len(goal.attributes) + len(goal.options) + 1
    return Score(kind * (attributes + options + price) / wanted, kind, attributes, options, price)


def type_factor(product: Product, wanted: Product, nouns: Nouns) -> float:
    """1 for the same kind of product, less the less their titles share."""
    names, asked = nouns(product.title), nouns(wanted.title)
    shared = len(set(names) & set(asked)) / len(asked) if asked else 0.2
    if shared == 0.0:
        return 0.0
    if shared < 0.1:
        return 0.1
    paths = [_path(product), _path(wanted)]
    alike = product.query == wanted.query or len(paths[0] & paths[1]) >= 2
    return 1.0 if alike or shared > 0.2 else 0.5


def attribute_matches(product: Product, wanted: Sequence[str]) -> int:
    """How many are among the product's attributes or said literally on its pages."""
    told = [product.title, " ".join(product.bullets), product.description]
    return sum(
        any(_alike(own, one) for own in product.attributes)
        or any(one in text.lower() for text in told)
        for one in wanted
    )


def option_matches(chosen: Sequence[str], wanted: Sequence[str]) -> int:
    plain = [_colour(option) for option in chosen]
    return sum(any(_alike(own, _colour(one)) for own in plain) for one in wanted)


def _path(product: Product) -> set[str]:
    return {part.strip() for part in product.product_category.split(PATH_MARK)}


def _colour(option: str) -> str:
    return next((colour for colour in COLOURS if colour in option), option)


def _alike(one: str, other: str) -> bool:
    return round(fuzz.token_set_ratio(_plain(one), _plain(other))) > MATCH


def _plain(text: str) -> str:
    return default_process(text.encode("ascii", "ignore").decode())


# ---------------------------------------------------------------- nouns of a title


def nouns_by(name: str) -> Nouns:
    """ "words": every word that may be a noun. "spacy": what spaCy's small English model calls
    one, as the authors' code does. Raises EnvError where that is not installed."""
    if name == "words":
        return title_words
    if name != "spacy":
        raise EnvError(f"There is no nouns {name!r}: words or spacy.", cause="refused")
    return _spacy_nouns()


def title_words(title: str) -> list[str]:
    words = re.findall(r"[a-z][a-z'-]+", title.lower())
    return [word for word in words if word not in FUNCTION_WORDS]


@functools.cache
def _spacy_nouns() -> Nouns:
    try:
        import spacy  # pyright: ignore[reportMissingImports]

        model: Any = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise EnvError(
            f"nouns: spacy needs spaCy and its model ({error}): pip install spacy; python -m spacy "
            "download en_core_web_sm. Or set nouns to words.",
            cause="refused",
        ) from None
    return lambda title: [t.text.lower() for t in model(title) if t.pos_ in ("NOUN", "PROPN")]
