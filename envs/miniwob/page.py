"""A MiniWoB page as text, and what a model may do on it. Pure functions.

Each element that shows something or can be used is a line with its number in brackets:
`[6] input checkbox unchecked`. Numbers stay the same during an episode.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Node = Mapping[str, Any]
"""An element as MiniWoB's core.getDOMInfo tells it."""
TEXT_NODE = "t"
CLEAR = "rgba(0, 0, 0, 0)"
_ACTION = re.compile(
    r"\b(click_at|click|type|press|select|wait)\s*"
    r"\(\s*((?:\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^()\"'])*)\)",
    re.IGNORECASE,
)
_ARGUMENT = re.compile(r"\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)'|([^,\s][^,]*)")


@dataclass(frozen=True, slots=True)
class Command:
    """`click(6)`, `type(6, "text")`, `press("Enter")`, `click_at(80, 100)`, `wait()`."""

    name: str
    ref: int = 0
    """The element's number."""
    text: str = ""
    point: tuple[int, int] = (0, 0)


def read_command(text: str) -> Command | None:
    """The last command in a text; None if there is none that makes sense."""
    found = _ACTION.findall(text)
    if not found:
        return None
    name, inside = found[-1][0].lower(), found[-1][1]
    given = [_unescaped(a or b) or c.strip() for a, b, c in _ARGUMENT.findall(inside)]
    match name, given:
        case "wait", []:
            return Command("wait")
        case "press", [key]:
            return Command("press", text=key)
        case "click", [ref] if _is_number(ref):
            return Command("click", ref=int(ref))
        case "click_at", [x, y] if _is_number(x) and _is_number(y):
            return Command("click_at", point=(int(x), int(y)))
        case "type" | "select", [ref, *words] if _is_number(ref):
            return Command("type", ref=int(ref), text=", ".join(words))
        case _:
            return None


def as_text(root: Node, choices: Mapping[str, Sequence[str]]) -> str:
    """The page's lines. `choices` are the options of each <select>, by its number."""
    return "\n".join(_lines(root, choices))


def refs(root: Node) -> set[int]:
    """The numbers of what can be clicked or typed into."""
    inner = (ref for child in root["children"] for ref in refs(child))
    return {int(root["ref"]), *inner} if root["tag"] != TEXT_NODE else set()


def _lines(node: Node, choices: Mapping[str, Sequence[str]]) -> list[str]:
    tag = str(node["tag"]).lower().replace("_", " ")
    children: Sequence[Node] = node["children"]
    text = " ".join(str(node.get("text") or "").split())
    if tag == TEXT_NODE:
        return [text] if text else []
    told = [line for child in children for line in _lines(child, choices)]
    own = "value" in node or tag in ("button", "a", "select", "textarea")
    if not (text or own or not children):
        return told  # only there to hold others
    line = f"[{node['ref']}] {tag}" + (f' "{text}"' if text else "")
    return [line + _state(node, text, str(node["ref"]), choices), *told]


def _state(node: Node, text: str, ref: str, choices: Mapping[str, Sequence[str]]) -> str:
    told = ""
    value = node.get("value")
    if isinstance(value, bool):
        told += " checked" if value else " unchecked"
    elif value:
        told += f" holds {value!r}"
    if ref in choices:
        told += f" of: {' | '.join(choices[ref])}"
    if not text and value is None and ref not in choices:
        names = f"{node.get('id') or ''} {_classes(node)}".split()
        told += f" {' '.join(names)}" if names else ""
        told += f" at ({round(node['left'])}, {round(node['top'])})"
        told += f" size {round(node['width'])} x {round(node['height'])}"
        colour = node.get("bgColor", CLEAR)
        told += f" {colour}" if colour != CLEAR else ""
    return told + (" (focused)" if node.get("focused") and node["tag"] != "BODY" else "")


def _classes(node: Node) -> str:
    """An SVG element's are no text."""
    classes = node.get("classes")
    return classes if isinstance(classes, str) else ""


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d{1,6}", text) is not None


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)
