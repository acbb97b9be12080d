"""The shop's pages as text, and what can be clicked on each.

A page is a list of pieces in the order of WebShop's own. `as_lines` shows them one below
the other, what can be clicked in brackets; `as_brief` leaves out what is only by the way, and
writes what can be clicked as the action that does it; `as_separated` joins them with [SEP],
which is the authors' text mode. Pages know nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from .catalogue import Product

SEARCH, BUY = "Search", "Buy Now"
BACK, NEXT, PREVIOUS = "Back to Search", "Next >", "< Prev"
SUB_PAGES = ("Description", "Features", "Reviews")
ATTRIBUTES = "Attributes"
PAGE_SIZE = 10
"""Products on a page of results."""


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    click: bool = False
    option: str = ""
    """The name of the option that this is a value of."""
    aside: bool = False
    """Whether a brief page goes without it."""


Page = list[Piece]


def search_page(instruction: str) -> Page:
    told = [Piece("Instruction:"), Piece(instruction)]
    return [Piece("WebShop", aside=True), *told, Piece(SEARCH, click=True)]


def results_page(instruction: str, found: Sequence[Product], number: int, size: int) -> Page:
    shown = found[(number - 1) * size : number * size]
    page = [*_told(instruction), _way(BACK)]
    page += [Piece(f"Page {number} (Total results: {len(found)})", aside=bool(shown))]
    page += [_way(PREVIOUS)] if number > 1 else []
    page += [_way(NEXT)]
    for product in shown:
        page += [Piece(product.asin, click=True), Piece(product.title), Piece(product.price_tag)]
    return page


def item_page(instruction: str, product: Product, sub_pages: Sequence[str]) -> Page:
    page = [*_told(instruction), _way(BACK), _way(PREVIOUS)]
    for name, values in product.options.items():
        page += [Piece(name), *(Piece(value, click=True, option=name) for value in values)]
    page += [Piece(product.title), Piece(f"Price: {product.price_tag}")]
    page += [Piece("Rating: N.A.", aside=True), *map(_way, sub_pages)]
    return [*page, Piece(BUY, click=True)]


def sub_page(instruction: str, product: Product, name: str) -> Page:
    told = {
        "Description": (product.description,),
        "Features": product.bullets,
        "Reviews": (),
        ATTRIBUTES: (
            *product.attributes,
            product.category,
            product.query,
            product.product_category,
        ),
    }
    page = [*_told(instruction), _way(BACK), _way(PREVIOUS)]
    return page + [Piece(text) for text in told[name] if text]


def end_page(reward: float) -> Page:
    told = ("Thank you for shopping with us!", "Your score (min 0.0, max 1.0)", f"{reward:.4g}")
    return [Piece(text) for text in told]


def clickable(page: Page) -> dict[str, Piece]:
    """By the words to click it with, which are in lower case."""
    return {piece.text.lower(): piece for piece in page if piece.click and piece.text != SEARCH}


def as_separated(page: Page) -> str:
    return " [SEP] ".join(piece.text for piece in page)


def as_lines(page: Page, chosen: Mapping[str, str]) -> str:
    """One piece a line, the values of an option in one; chosen ones are marked."""
    return _lines(page, chosen, lambda piece: f"[{piece.text}]")


def as_brief(page: Page, chosen: Mapping[str, str]) -> str:
    """The same without asides. They can be clicked all the same."""
    return _lines([piece for piece in page if not piece.aside], chosen, _action)


def _lines(page: Page, chosen: Mapping[str, str], button: Callable[[Piece], str]) -> str:
    lines: list[str] = []
    for option, group in groupby(page, key=lambda piece: piece.option):
        pieces = list(group)
        if option:
            values = (button(piece) + _mark(piece, chosen) for piece in pieces)
            lines[-1] += ": " + " ".join(values)
        else:
            lines += [button(piece) if piece.click else piece.text for piece in pieces]
    return "\n".join(lines)


def _action(piece: Piece) -> str:
    return "search[words]" if piece.text == SEARCH else f"click[{piece.text.lower()}]"


def _mark(piece: Piece, chosen: Mapping[str, str]) -> str:
    return " (chosen)" if chosen.get(piece.option) == piece.text else ""


def _told(instruction: str) -> Page:
    """On every page but the first, where a brief one has it too."""
    return [Piece("Instruction:", aside=True), Piece(instruction, aside=True)]


def _way(text: str) -> Piece:
    """A button to another page of the same thing."""
    return Piece(text, click=True, aside=True)
