"""The shop: rewards computed by hand, its files, its pages, and visits to their end."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from astuner.env.local import LocalEnvs
from astuner.env.registry import find_environment
from astuner.errors import EnvError

pytest.importorskip("bm25s", reason="the environment's own requirements.txt")
pytest.importorskip("rapidfuzz", reason="the environment's own requirements.txt")

from envs.webshop import generator
from envs.webshop.catalogue import (
    NO_LIMIT,
    PATH_MARK,
    Goal,
    Product,
    build_catalogue,
    read_catalogue,
)
from envs.webshop.reward import (
    attribute_matches,
    nouns_by,
    option_matches,
    score,
    title_words,
    type_factor,
)
from envs.webshop.search import Search

BOOTS = Product(
    asin="B000000001",
    title="Arvella Classic Hiking Boots, Waterproof",
    description="The upper is a Breathable Mesh.",
    bullets=("Made to last.",),
    attributes=("waterproof", "rubber soles"),
    category="clothing",
    query="hiking boots",
    product_category="Clothing > Men > Shoes > Boots".replace(">", PATH_MARK),
    price=50.0,
    price_tag="$50.0",
    options={"color": ("navy blue", "black"), "size": ("9", "10")},
)
WANTED = replace(BOOTS, asin="B000000002", title="Bexton Premium Hiking Boots, Slip Resistant")


def goal(*attributes: str, options: tuple[str, ...] = (), limit: float = 60.0) -> Goal:
    return Goal("buy boots", WANTED, attributes, options, limit)


# ---------------------------------------------------------------- the reward


@pytest.mark.parametrize(
    ("wanted", "chosen", "reward"),
    [
        (goal("waterproof"), [], 2 / 2),  # attribute and price
        (goal("waterproof", limit=49.99), [], 1 / 2),
        (goal("waterproof", "slip resistant"), [], 2 / 3),
        (goal("waterproof", "slip resistant", "breathable mesh"), [], 3 / 4),  # in the description
        (goal("rubber sole"), [], 2 / 2),  # near enough to "rubber soles"
        (goal("waterproof", options=("black", "10")), [], 2 / 4),
        (goal("waterproof", options=("black", "10")), ["black", "9"], 3 / 4),
        (goal("waterproof", options=("black", "10")), ["10", "black"], 4 / 4),
        (goal("steel toe", options=("10",), limit=10.0), ["9"], 0 / 3),
    ],
)
def test_the_reward_of_the_same_kind(wanted: Goal, chosen: list[str], reward: float) -> None:
    assert score(BOOTS, chosen, wanted, title_words).reward == pytest.approx(reward)


@pytest.mark.parametrize(
    ("title", "query", "path", "factor"),
    [
        ("Hiking Boots", "x", "a > b", 1.0),  # 2 of 6 words
        ("Hiking Poles", "x", "a > b", 0.5),  # 1 of 6 words, of another kind
        ("Hiking Poles", "hiking boots", "a > b", 1.0),  # found by the same search
        ("Hiking Poles", "x", "Boots > Shoes > Sport", 1.0),  # two parts of the path
        ("Hiking Poles", "x", "Boots > Boots", 0.5),  # one part
        ("Desk Lamp", "hiking boots", "Clothing > Men > Shoes", 0.0),  # no word shared
    ],
)
def test_the_factor_of_another_kind(title: str, query: str, path: str, factor: float) -> None:
    category = path.replace(">", PATH_MARK)
    bought = replace(BOOTS, title=title, query=query, product_category=category)
    assert type_factor(bought, WANTED, title_words) == factor
    reward = score(bought, [], goal("waterproof"), title_words).reward
    assert reward == pytest.approx(factor * 1.0)


def test_a_factor_of_a_tenth_and_titles_without_nouns() -> None:
    eleven = replace(WANTED, title="boots " + " ".join("abcdefghij"[i] * 3 for i in range(10)))
    assert type_factor(BOOTS, eleven, title_words) == 0.1  # 1 of 11
    nothing = replace(WANTED, title="for the", query="y", product_category="z")
    assert type_factor(BOOTS, nothing, title_words) == 0.5


def test_phrases_and_colours_match_as_in_the_authors_code() -> None:
    oils = replace(BOOTS, attributes=("tea tree", "essential oil", "natural ingredients"))
    assert attribute_matches(oils, ["tea tree", "essential oils", "natural ingredients"]) == 3
    chosen = ["pack of 12", "powder snow", "xl"]
    assert option_matches(chosen, ["cool powder snow", "XL", "pack of 12"]) == 3
    assert option_matches(["dark navy"], ["light navy"]) == 0, "dark and light come first"
    assert option_matches(["navy blue"], ["blue | white"]) == 1, "both are blue"
    assert option_matches(["navy blue"], ["navy"]) == 0, "blue comes before navy"
    assert option_matches([], ["black"]) == 0


def test_nouns_that_cannot_be_had_say_how() -> None:
    with pytest.raises(EnvError, match="words or spacy"):
        nouns_by("verbs")
    try:
        import spacy  # noqa: F401  # pyright: ignore
    except ImportError:
        with pytest.raises(EnvError, match="pip install spacy"):
            nouns_by("spacy")


# ---------------------------------------------------------------- the files


def item(asin: str, **others: Any) -> dict[str, Any]:
    scraped = {
        "asin": asin,
        "name": "A Lamp",
        "full_description": "It shines.",
        "small_description": ["bright", "small"],
        "category": "home",
        "query": " Desk Lamp ",
        "product_category": "Home > Lamps",
        "pricing": "$19.99",
        "customization_options": {},
        "images": ["x.jpg"],
    }
    return {**scraped, **others}


def test_products_are_read_as_the_original_reads_them() -> None:
    items = [
        item("B1", customization_options={"Color": [{"value": " Red/White ", "image": None}],
                                          "Size": None}),
        item("B1", name="the same number again"),
        item("nan"),
        item("B0123456789"),
        item("B2", pricing="$1,010.00", small_description="one text", full_description=None),
        item("B3", pricing=None),
        item("B4", pricing="$10.00 - $20.00"),
    ]  # fmt: skip
    told = {"instruction_attributes": ["bright"], "instruction_options": ["red | white"]}
    people = {
        "B1": [{"instruction": "i need a lamp.", **told}, {"instruction": "x", **told},
               {"instruction": "skipped", "instruction_attributes": []}],
        "B2": [{"instruction": "a dear lamp", **told}],
    }  # fmt: skip
    shop = build_catalogue(items, {"B1": {"attributes": ["bright"]}}, people, human=True)
    lamp, dear, unpriced, ranged = shop.products.values()
    assert (lamp.asin, lamp.title, lamp.query) == ("B1", "A Lamp", "desk lamp")
    assert lamp.options == {"color": ("red | white",)}
    assert lamp.searched_text == "a lamp it shines. bright color: red | white"
    assert (lamp.price, lamp.price_tag) == (19.99, "$19.99")
    assert (dear.price, dear.bullets, dear.attributes) == (1010.0, ("one text",), ("DUMMY_ATTR",))
    assert (unpriced.price, unpriced.price_tag) == (100.0, "$100.0")
    assert ranged.price_tag == "$10.0 to $20.0"
    assert 10.0 <= ranged.price <= 20.0
    goals = {goal.instruction.partition(",")[0]: goal for goal in shop.goals}
    assert set(goals) == {"i need a lamp", "x", "a dear lamp"}
    limited = goals["i need a lamp"]
    assert limited.price_limit in (30.0, 40.0, 50.0)
    assert limited.instruction.endswith(f", and price lower than {limited.price_limit:.2f} dollars")
    assert limited.options == ("red | white",)
    assert goals["a dear lamp"].price_limit == NO_LIMIT
    assert goals["a dear lamp"].instruction == "a dear lamp"


def test_synthetic_goals_are_combinations_of_options() -> None:
    values = {"color": [{"value": "red"}, {"value": "blue"}], "size": [{"value": "s"}]}
    told = {
        "attributes": ["bright"],
        "instruction": "Find a lamp",
        "instruction_attributes": ["bright"],
    }
    items = [item("B1", customization_options=values), item("B2")]
    shop = build_catalogue(items, {"B1": told, "B2": {"instruction": None}}, {}, human=False)
    assert sorted(goal.options for goal in shop.goals) == [("blue", "s"), ("red", "s")]
    assert sorted(goal.instruction.partition(", and price")[0] for goal in shop.goals) == [
        "Find a lamp with color: blue, and size: s",
        "Find a lamp with color: red, and size: s",
    ]
    with pytest.raises(EnvError, match="Set goals to synthetic"):
        build_catalogue(items, {}, {}, human=True)


def test_written_files_are_the_shop_that_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generator", str(tmp_path), "--products", "40", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", command)
    generator.main()
    made = build_catalogue(*generator.make_items(40, 5), human=True)
    assert read_catalogue(tmp_path, 0, True) == made
    assert len(made.products) == len(made.goals) == 40
    assert [len(made.split(name)) for name in ("test", "dev", "train")] == [5, 5, 30]
    assert len(read_catalogue(tmp_path, 12, True).products) == 12
    with pytest.raises(EnvError, match="no items_shuffle"):
        read_catalogue(tmp_path / "nothing", 0, True)


def test_the_search_ranks_by_words() -> None:
    lamp = replace(BOOTS, title="Desk lamp", description="", bullets=(), options={})
    both = replace(lamp, title="Desk lamp blue lamp")
    other = replace(lamp, title="A red chair of wood")
    search = Search([other, lamp, both])
    # 1/2.02 + 2/3.02 = 1.157 against 1/1.78 + 1/1.78 = 1.124, each times the same idf
    assert [p.title for p in search.find("LAMP, desk")] == ["Desk lamp blue lamp", "Desk lamp"]
    assert [p.title for p in search.find("blue lamps")] == ["Desk lamp blue lamp"]
    assert search.find("the of") == search.find("zebra") == []


# ---------------------------------------------------------------- visits


def visit(**params: Any) -> Any:
    return find_environment("webshop")("train-0", {"num_products": 200, **params})


def test_pages_and_actions() -> None:
    env = visit(observation="separated", goal=0)
    shown, info = env.reset(seed=1)
    instruction = env._goal.instruction
    assert shown == f"WebShop [SEP] Instruction: [SEP] {instruction} [SEP] Search"
    assert info == {"page": "search", "available_actions": ["search[<words>]"]}
    shown = env.step("Search[boots shoes jacket shirt]")[0]
    pieces = shown.split(" [SEP] ")
    assert pieces[:5] == ["Instruction:", instruction, "Back to Search",
                          "Page 1 (Total results: 40)", "Next >"]  # fmt: skip
    assert len(pieces) == 5 + 3 * 10
    second = env.step("click[next >]")[0].split(" [SEP] ")
    assert second[3:6] == ["Page 2 (Total results: 40)", "< Prev", "Next >"]
    assert not set(second[6::3]) & set(pieces[5::3])
    assert env.step("click[< prev]")[0] == shown
    env.step("click[next >]")
    asin = second[6]
    page = env.step(f"I take this one: click[{asin.lower()}]")[0].split(" [SEP] ")
    assert page[2:4] == ["Back to Search", "< Prev"]
    assert page[-4:] == ["Description", "Features", "Reviews", "Buy Now"]
    name, values = next(iter(env._product.options.items()))
    env.step(f"click[{values[1]}]")
    assert env._chosen == {name: values[1]}
    told = env.step("click[features]")[0].split(" [SEP] ")
    assert tuple(told[4:]) == env._product.bullets
    assert env.step("click[buy now]")[4]["invalid_action"], "not on this page"
    assert env.step("click[< prev]")[0] == " [SEP] ".join(page)
    assert env._chosen == {name: values[1]}, "a look at the features forgets nothing"
    assert env.step("click[< prev]")[0] == " [SEP] ".join(second)
    assert env._chosen == {}, "options belong to a product"
    shown, *_, info = env.step("click[back to search]")
    assert shown.startswith("WebShop [SEP]")
    assert info["page"] == "search"
    first = f"click[{env._shop.search.find('hiking boots')[0].asin}]"
    ways = ["search[zebra]", "search[hiking boots]", first, "click[reviews]", "click[< prev]"]
    pages = [env.step(way)[4]["page"] for way in [*ways, "click[buy now]"]]
    assert pages == ["search", "results", "item", "item", "item", "end"]


def test_lines_mark_what_can_be_clicked_and_what_was_chosen() -> None:
    env = visit(goal=0)
    env.reset(seed=0)
    env.step("search[hiking boots]")
    shown = env.step(f"click[{env._found[0].asin}]")[0]
    color = env._product.options["color"]
    assert f"color: {' '.join(f'[{c}]' for c in color)}\n" in shown
    assert f"[{color[0]}] (chosen) [{color[1]}]" in env.step(f"click[{color[0]}]")[0]
    told, *rest, info = env.step("click[purple elephant]")
    assert told.startswith("That is no action here.\nInstruction:")
    assert rest == [0.0, False, False]
    assert info["invalid_action"]
    assert "invalid_action" not in env.step("click[buy now] or rather click[description]")[4]


def test_a_brief_page_is_actions_and_what_they_lead_to() -> None:
    env = visit(goal=0, observation="brief", page_size=2)
    wanted = env._goal_of(0)
    assert env.reset(seed=0)[0] == f"Instruction:\n{wanted.instruction}\nsearch[words]"
    shown = env.step(f"search[{wanted.product.query}]")[0]
    first, second = env._found[:2]
    assert shown.split("\n") == [
        f"click[{first.asin.lower()}]", first.title, first.price_tag,
        f"click[{second.asin.lower()}]", second.title, second.price_tag,
    ]  # fmt: skip
    shown = env.step(f"click[{first.asin.lower()}]")[0]
    name, values = next(iter(first.options.items()))
    assert shown.startswith(f"{name}: " + " ".join(f"click[{value}]" for value in values))
    assert shown.endswith(f"{first.title}\nPrice: {first.price_tag}\nclick[buy now]")
    assert f"click[{values[0]}] (chosen)" in env.step(f"click[{values[0]}]")[0]
    assert env.step("click[< prev]")[0].startswith(f"click[{first.asin.lower()}]\n"), "as ever"
    assert env.step("click[zebra]")[0].startswith("That is no action here.\nclick[")
    assert env.step("search[zebra]")[0] == "Page 1 (Total results: 0)"


@pytest.mark.parametrize("number", range(0, 200, 25))
def test_what_was_asked_for_is_worth_one(number: int) -> None:
    env = visit(goal=number, max_steps=20)
    env.reset(seed=0)
    wanted = env._goal
    env.step(f"search[{wanted.product.title}]")
    while f"click[{wanted.product.asin.lower()}]" not in env.get_info()["available_actions"]:
        env.step("click[next >]")
    env.step(f"click[{wanted.product.asin}]")
    for option in wanted.options:
        assert "invalid_action" not in env.step(f"click[{option}]")[4]
    shown, reward, terminated, truncated, told = env.step("<action>click[Buy Now]</action>")
    assert shown == "Thank you for shopping with us!\nYour score (min 0.0, max 1.0)\n1"
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert told["options"] == len(wanted.options)


def test_steps_are_limited_and_a_seed_is_a_goal() -> None:
    env = visit(max_steps=2)
    first = env.reset(seed=4)[0]
    assert [env.step("hm")[2:4] for _ in range(2)] == [(False, False), (False, True)]
    assert env.reset()[0] == first != env.reset(seed=5)[0]
    validation = find_environment("webshop")("validation-0", {"num_products": 200})
    validation.reset(seed=4)
    assert validation._goal in validation._shop.catalogue.split("dev")
    assert env._goal in env._shop.catalogue.split("train")


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"data": "/no/such/folder"}, "no items_shuffle"),
        ({"goals": "divine"}, "human or synthetic"),
        ({"split": "holdout"}, "train, dev or test"),
        ({"goal": 10**6}, "goal is 1000000"),
        ({"moons": 2}, "{'moons': 2}"),
        ({"observation": "html"}, "html"),
        ({"page_size": 0}, "page_size is 0"),
        ({"page_size": -3}, "page_size is -3"),
        ({"page_size": "x"}, "page_size is 'x'"),
        ({"page_size": None}, "page_size is None"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"num_products": -1}, "num_products is -1"),
    ],
)
def test_what_does_not_fit_is_refused(params: dict[str, Any], told: str) -> None:
    with pytest.raises(EnvError) as caught:
        visit(**params)
    assert told in str(caught.value)
    assert caught.value.cause == "refused"


async def test_200_instances_share_one_shop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all of them come first."""
    visit()  # so that it is loaded
    module = sys.modules[find_environment("webshop").__module__]
    made: list[int] = []

    class Counted(Search):
        def __init__(self, products: Any) -> None:
            made.append(len(products))
            super().__init__(products)

    monkeypatch.setattr(module, "Search", Counted)
    monkeypatch.setattr(module, "_shops", {})
    local = LocalEnvs(find_environment)
    params = {"num_products": 300}
    await asyncio.gather(*(local.create("webshop", f"t{i}", f"i{i}", params) for i in range(200)))
    assert made == [300]
    shops = {id(local._instances[f"i{i}"].env._shop) for i in range(200)}
    assert len(shops) == 1
    steps = await asyncio.gather(*(local.step(f"i{i}", "search[green tea]") for i in range(200)))
    assert {step.observation.splitlines()[5].startswith("[B") for step in steps} == {True}
    await local.aclose()
