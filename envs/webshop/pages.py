"""The shop's pages as text, and what can be clicked on each.

A page is a list of pieces in the order of WebShop's own. `as_lines` shows them one below
the other, what can be clicked in brackets; `as_separated` joins them with [SEP], which is the
authors' text mode. Pages know nothing of sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from .catalogue import Product

BACK, NEXT, PREVIOUS, BUY = "Back to Search", "Next >", "< Prev", "Buy Now"
SUB_PAGES = ("Description", "Features", "Reviews")
ATTRIBUTES = "Attributes"
PAGE_SIZE = 10


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    click: bool = False
    option: str = ""
    """The name of the option that this is a value of."""


Page = list[Piece]


def search_page(instruction: str) -> Page:
    return [Piece("WebShop"), *_told(instruction), Piece("Search", click=True)]


def results_page(instruction: str, found: Sequence[Product], number: int) -> Page:
    shown = found[(number - 1) * PAGE_SIZE : number * PAGE_SIZE]
    page = [*_told(instruction), _button(BACK)]
    page += [Piece(f"Page {number} (Total results: {len(found)})")]
    page += [_button(PREVIOUS)] if number > 1 else []
    page += [_button(NEXT)]
    for product in shown:
        page += [_button(product.asin), Piece(product.title), Piece(product.price_tag)]
    return page


def item_page(instruction: str, product: Product, sub_pages: Sequence[str]) -> Page:
    page = [*_told(instruction), _button(BACK), _button(PREVIOUS)]
    for name, values in product.options.items():
        page += [Piece(name), *(Piece(value, click=True, option=name) for value in values)]
    page += [Piece(product.title), Piece(f"Price: {product.price_tag}"), Piece("Rating: N.A.")]
    return [*page, *map(_button, sub_pages), _button(BUY)]


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
    page = [*_told(instruction), _button(BACK), _button(PREVIOUS)]
    return page + [Piece(text) for text in told[name] if text]


def end_page(reward: float) -> Page:
    told = ("Thank you for shopping with us!", "Your score (min 0.0, max 1.0)", f"{reward:.4g}")
    return [Piece(text) for text in told]


def clickable(page: Page) -> dict[str, Piece]:
    """By the words to click it with, which are in lower case."""
    return {piece.text.lower(): piece for piece in page if piece.click and piece.text != "Search"}


def as_separated(page: Page) -> str:
    return " [SEP] ".join(piece.text for piece in page)


def as_lines(page: Page, chosen: Mapping[str, str]) -> str:
    """One piece a line, the values of an option in one; chosen ones are marked."""
    lines: list[str] = []
    for option, group in groupby(page, key=lambda piece: piece.option):
        pieces = list(group)
        if option:
            lines[-1] += ": " + " ".join(_mark(piece, chosen) for piece in pieces)
        else:
            lines += [f"[{piece.text}]" if piece.click else piece.text for piece in pieces]
    return "\n".join(lines)


def _mark(piece: Piece, chosen: Mapping[str, str]) -> str:
    return f"[{piece.text}]{' (chosen)' if chosen.get(piece.option) == piece.text else ''}"


def _told(instruction: str) -> Page:
    return [Piece("Instruction:"), Piece(instruction)]


def _button(text: str) -> Piece:
    return Piece(text, click=True)
