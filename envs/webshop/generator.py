"""Made products with instructions, in the format of WebShop's own files.

A seed decides everything. Products are alike enough that a search for the kind of thing is
not enough: brands, attributes, options and prices must be compared. As a command it writes
the three files: python -m envs.webshop.generator FOLDER [--products 1000] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .catalogue import PATH_MARK

_BRANDS = """
Arvella Bexton Calmora Dorrin Elvane Fintra Galdor Harwick Ivory&Co Jorvik Kestrel Lumina Marlow
Nordby Oakfen Pellan Quilla Rovent Sorrel Tavish Umber Vantor Wexley Yarrow Zephira
"""
_ADJECTIVES = "Premium Classic Everyday Deluxe Essential Modern Original Compact Professional"
_COLOURS = "black white navy blue red green grey pink beige brown purple yellow"
BRANDS, ADJECTIVES, COLOURS = _BRANDS.split(), _ADJECTIVES.split(), _COLOURS.split()
SIZES = ("small", "medium", "large", "x-large", "xx-large")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of product."""

    noun: str
    category: str
    path: str
    attributes: tuple[str, ...]
    options: dict[str, tuple[str, ...]]
    price: tuple[float, float]
    """Dollars, from and to."""

    @property
    def query(self) -> str:
        return self.noun.lower()


def _kind(
    noun: str, path: str, attributes: str, options: dict[str, Any], low: float, high: float
) -> Kind:
    words = tuple(one.strip() for one in attributes.split(","))
    values = {name: tuple(given) for name, given in options.items()}
    category = re.split("[,&>]", path)[0].strip().lower()
    return Kind(noun, category, path.replace(">", PATH_MARK), words, values, (low, high))


KINDS = (
    _kind("Hiking Boots", "Clothing, Shoes & Jewelry > Men > Shoes > Boots",
          "waterproof, slip resistant, rubber sole, breathable mesh, steel toe, lightweight",
          {"color": COLOURS[:6], "size": ("8", "9", "10", "11", "12")}, 35, 160),
    _kind("Running Shoes", "Clothing, Shoes & Jewelry > Women > Shoes > Athletic",
          "memory foam, breathable mesh, arch support, non slip, lightweight, rubber sole",
          {"color": COLOURS[:8], "size": ("6", "7", "8", "9", "10")}, 25, 130),
    _kind("Rain Jacket", "Clothing, Shoes & Jewelry > Women > Clothing > Coats",
          "water resistant, machine wash, quick dry, adjustable hood, zipper closure, long sleeve",
          {"color": COLOURS, "size": SIZES}, 30, 140),
    _kind("Linen Shirt", "Clothing, Shoes & Jewelry > Men > Clothing > Shirts",
          "machine wash, regular fit, button closure, short sleeve, wrinkle free, slim fit",
          {"color": COLOURS, "size": SIZES}, 15, 60),
    _kind("Throw Blanket", "Home & Kitchen > Bedding > Blankets & Throws",
          "super soft, machine washable, double sided, hypoallergenic, lightweight, faux fur",
          {"color": COLOURS, "size": ("50 x 60 inch", "60 x 80 inch", "90 x 90 inch")}, 18, 80),
    _kind("Area Rug", "Home & Kitchen > Home Decor > Rugs",
          "stain resistant, non shedding, easy clean, spot clean, non slip, water resistant",
          {"color": COLOURS[:7], "size": ("3 x 5 feet", "5 x 8 feet", "8 x 10 feet")}, 40, 260),
    _kind("Coffee Table", "Home & Kitchen > Furniture > Living Room > Tables",
          "solid wood, easy assembly, storage space, mid century, tempered glass, metal legs",
          {"color": ("walnut", "white", "black", "natural oak")}, 70, 320),
    _kind("Desk Lamp", "Tools & Home Improvement > Lighting > Lamps",
          "eye protection, usb port, space saving, energy saving, remote control",
          {"color": COLOURS[:6], "style": ("with clamp", "with base")}, 15, 75),
    _kind("Face Cream", "Beauty & Personal Care > Skin Care > Face > Moisturizers",
          "fragrance free, cruelty free, anti aging, hyaluronic acid, vitamin c, oil free",
          {"size": ("1 ounce", "1.7 ounce", "3.4 ounce")}, 9, 70),
    _kind("Shampoo", "Beauty & Personal Care > Hair Care > Shampoo",
          "sulfate free, paraben free, tea tree, argan oil, color safe, natural ingredients",
          {"scent": ("lavender", "citrus", "coconut"), "size": ("8 ounce", "16 ounce")},
          7, 40),
    _kind("Electric Toothbrush", "Beauty & Personal Care > Oral Care > Toothbrushes",
          "teeth whitening, rechargeable battery, travel case, soft bristles, waterproof",
          {"color": COLOURS[:5]}, 20, 120),
    _kind("Wireless Headphones", "Electronics > Headphones > Over-Ear Headphones",
          "noise cancelling, long lasting battery, fast charging, foldable design, hands free",
          {"color": COLOURS[:6]}, 25, 240),
    _kind("Bluetooth Speaker", "Electronics > Portable Audio > Speakers",
          "stereo sound, long lasting battery, water resistant, hands free, led lights",
          {"color": COLOURS[:7], "style": ("mini", "standard", "max")}, 18, 160),
    _kind("Phone Case", "Electronics > Cell Phones > Cases",
          "wireless charging, shock absorbing, screen protector, kickstand, card holder",
          {"color": COLOURS, "size": ("standard", "plus", "pro max")}, 8, 40),
    _kind("USB C Cable", "Electronics > Accessories > Cables",
          "fast charging, nylon braided, heavy duty, data transfer, right angle, long lasting",
          {"color": COLOURS[:4], "size": ("3 feet", "6 feet", "10 feet")}, 6, 30),
    _kind("Granola Bars", "Grocery & Gourmet Food > Snack Foods > Bars",
          "gluten free, non gmo, low sugar, high protein, dairy free, individually wrapped",
          {"flavor": ("chocolate", "peanut butter", "blueberry", "almond"),
           "size": ("pack of 6", "pack of 12", "pack of 24")}, 8, 45),
    _kind("Green Tea", "Grocery & Gourmet Food > Beverages > Tea",
          "caffeine free, certified organic, non gmo, loose leaf, sugar free, resealable bag",
          {"flavor": ("jasmine", "mint", "ginger"), "size": ("20 count", "50 count")}, 5, 35),
    _kind("Dog Bed", "Pet Supplies > Dogs > Beds",
          "machine washable, memory foam, non slip, water resistant, orthopedic, removable cover",
          {"color": COLOURS[:6], "size": SIZES[:4]}, 25, 130),
    _kind("Yoga Mat", "Sports & Outdoors > Exercise & Fitness > Yoga",
          "non slip, eco friendly, extra thick, carrying strap, easy clean, latex free",
          {"color": COLOURS, "size": ("6 mm", "8 mm", "10 mm")}, 15, 70),
    _kind("Water Bottle", "Sports & Outdoors > Accessories > Water Bottles",
          "leak proof, bpa free, stainless steel, vacuum insulated, wide mouth",
          {"color": COLOURS, "size": ("18 ounce", "24 ounce", "32 ounce", "40 ounce")}, 10, 45),
)  # fmt: skip
OPENINGS = (
    "i am looking for {thing}",
    "i need {thing}",
    "i want to buy {thing}",
    "find me {thing}",
    "please help me find {thing}",
)

Items = list[dict[str, Any]]


def make_items(products: int, seed: int = 0) -> tuple[Items, dict[str, Any], dict[str, Any]]:
    """The contents of items_shuffle, items_ins_v2 and items_human_ins."""
    draw = random.Random(seed)
    items: Items = []
    attributes: dict[str, Any] = {}
    people: dict[str, Any] = {}
    asins: set[str] = set()
    while len(items) < products:
        asin = "B" + "".join(draw.choices(string.ascii_uppercase + string.digits, k=9))
        if asin in asins:
            continue
        asins.add(asin)
        kind = KINDS[len(items) % len(KINDS)]
        owned = draw.sample(kind.attributes, draw.randint(2, 4))
        item = _item(asin, kind, owned, draw)
        items.append(item)
        wanted = draw.sample(owned, draw.randint(1, 2))
        attributes[asin] = {
            "attributes": owned,
            "instruction": _instruction(kind, wanted, [], draw),
            "instruction_attributes": wanted,
        }
        people[asin] = [_human(asin, kind, item, owned, draw)]
    order = list(items)
    draw.shuffle(order)
    return order, attributes, people


def _item(asin: str, kind: Kind, owned: list[str], draw: random.Random) -> dict[str, Any]:
    brand, adjective = draw.choice(BRANDS), draw.choice(ADJECTIVES)
    low = round(draw.uniform(*kind.price), 2)
    ranged = draw.random() < 0.25
    pricing = f"${low:.2f} - ${low * draw.uniform(1.1, 1.5):.2f}" if ranged else f"${low:.2f}"
    offered = {
        name: draw.sample(values, draw.randint(2, len(values)))
        for name, values in kind.options.items()
    }
    return {
        "asin": asin,
        "name": f"{brand} {adjective} {kind.noun}, {', '.join(o.title() for o in owned[:2])}",
        "full_description": f"The {adjective.lower()} {kind.noun.lower()} by {brand}. "
        f"It offers {' and '.join(owned)}.",
        "small_description": [f"{one.capitalize()}: made to last." for one in owned],
        "category": kind.category,
        "query": kind.query,
        "product_category": kind.path,
        "pricing": pricing,
        "customization_options": {
            name: [{"value": value, "image": None} for value in values]
            for name, values in offered.items()
        },
        "images": [""],
    }


def _human(
    asin: str, kind: Kind, item: dict[str, Any], owned: list[str], draw: random.Random
) -> dict[str, Any]:
    wanted = draw.sample(owned, draw.randint(1, 3) if len(owned) > 2 else 1)
    offered: dict[str, Any] = item["customization_options"]
    named = draw.sample(sorted(offered), draw.randint(0, len(offered)))
    chosen = {name: str(draw.choice(offered[name])["value"]) for name in named}
    return {
        "asin": asin,
        "instruction": _instruction(kind, wanted, list(chosen.items()), draw),
        "attributes": owned,
        "options": [f"{name}: {value}" for name, value in chosen.items()],
        "instruction_attributes": wanted,
        "instruction_options": list(chosen.values()),
    }


def _instruction(
    kind: Kind, wanted: list[str], chosen: list[tuple[str, str]], draw: random.Random
) -> str:
    thing = f"{kind.noun.lower()} with {' and '.join(wanted)}"
    for name, value in chosen:
        thing += f", {name} {value}"
    return draw.choice(OPENINGS).format(thing=thing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--products", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    names = ("items_shuffle.json", "items_ins_v2.json", "items_human_ins.json")
    for name, data in zip(names, make_items(args.products, args.seed), strict=True):
        (args.folder / name).write_text(json.dumps(data), encoding="utf-8")
        print(args.folder / name)


if __name__ == "__main__":
    main()
