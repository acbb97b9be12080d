"""A schema as a flat table: every key, its type, default, documentation and readers.

Keys are named from below the root, as on the command line: "rollout.num_repeat".
Loading, explaining and the reference page all walk such a table, so none of them
knows the schema's classes. It reads no file but the schema's own source, from
which it takes the docstrings under the fields. The plain functions are about the
schema of runs; the service has a table of its own.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from astuner.config import schema

_NEAR = 0.6
"""How alike two names must be (0..1, difflib) to be offered as a correction."""
_NEAR_ELSEWHERE = 0.75
"""Likewise for a key of another section."""
_TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: "a list of texts, e.g. [a, b]",
    list[float]: "a list of numbers, e.g. [0.9, 0.999]",
    dict[str, Any]: "a mapping, e.g. {name: value}",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One leaf of the schema."""

    name: str
    type: Any
    """str, int, float, bool, list[...] or dict[str, Any]."""
    default: Any
    doc: str
    backbones: tuple[str, ...]
    """The only backbones that read it; empty when all may."""

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def type_name(self) -> str:
        return _TYPE_NAMES[self.type]

    @property
    def is_open(self) -> bool:
        """A mapping whose own keys are the user's choice."""
        return self.type == dict[str, Any]


@dataclass(frozen=True, slots=True)
class Section:
    """An inner node of the schema."""

    name: str
    doc: str
    children: tuple[str, ...]
    """Full names of the keys and sections right below."""


class Table:
    """Every key of one schema, below one root key."""

    def __init__(self, root: str, schema_class: type, root_class: type) -> None:
        """`root_class` is the dataclass whose only field is the root."""
        self.root = root
        self.schema_class = schema_class
        self.root_class = root_class

    @cached_property
    def keys(self) -> Mapping[str, Key]:
        """Every leaf, in the order of the schema."""
        return {node.name: node for node in _walk(self.schema_class) if isinstance(node, Key)}

    @cached_property
    def sections(self) -> Mapping[str, Section]:
        """Every inner node, outer ones first; the root has the name ""."""
        return {node.name: node for node in _walk(self.schema_class) if isinstance(node, Section)}

    def full(self, name: str) -> str:
        """The key as a YAML file spells it: "astuner.rollout.num_repeat"."""
        return f"{self.root}.{name}" if name else self.root

    def short(self, name: str) -> str:
        """The inverse of `full`; a name without the root stays as it is."""
        return "" if name == self.root else name.removeprefix(f"{self.root}.")

    def open_parent(self, name: str) -> Key | None:
        """The open mapping that `name` lies in, e.g. `model.template_kwargs` for
        `model.template_kwargs.enable_thinking`."""
        parts = name.split(".")
        for end in range(1, len(parts)):
            key = self.keys.get(".".join(parts[:end]))
            if key is not None and key.is_open:
                return key
        return None

    def nearest(self, name: str) -> str | None:
        """The key or section that a mistyped `name` most likely means.

        The last part decides, so that a leaf put into the wrong section is found; then
        the likeness of the whole, and whether the section is the same.
        """
        section, _, leaf = name.rpartition(".")
        near: list[tuple[float, str]] = []
        for known in [*self.keys, *(s for s in self.sections if s)]:
            known_section, _, known_leaf = known.rpartition(".")
            likeness = _alike(leaf, known_leaf)
            if len(leaf) > 3 and leaf in known_leaf:
                likeness = max(likeness, 0.9)
            if likeness >= (_NEAR if section == known_section else _NEAR_ELSEWHERE):
                same = 0.3 * (section == known_section) + 0.2 * (leaf == known_leaf)
                near.append((likeness + _alike(name, known) + same, known))
        return max(near)[1] if near else None


ROOT = "astuner"
RUN = Table(ROOT, schema.AstunerConfig, schema.RootConfig)


def keys() -> Mapping[str, Key]:
    """See `Table.keys`."""
    return RUN.keys


def sections() -> Mapping[str, Section]:
    """See `Table.sections`."""
    return RUN.sections


def full(name: str) -> str:
    """See `Table.full`."""
    return RUN.full(name)


def nearest(name: str) -> str | None:
    """See `Table.nearest`."""
    return RUN.nearest(name)


def nearest_choice(value: str, choices: tuple[str, ...]) -> str | None:
    """The choice that a mistyped `value` most likely means."""
    return next(iter(difflib.get_close_matches(value, choices, n=1, cutoff=_NEAR)), None)


def get(config: object, name: str) -> Any:
    """The value of the key (or section) `name`."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _alike(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()


def _walk(
    cls: type, prefix: str = "", doc: str = "", backbones: tuple[str, ...] = ()
) -> Iterator[Key | Section]:
    """The section that `cls` describes, then all that is below it."""
    class_doc, docs = _docs(cls.__module__)[cls.__name__]
    types = typing.get_type_hints(cls)
    fields = {f"{prefix}{f.name}": f for f in dataclasses.fields(cls)}
    yield Section(prefix.rstrip("."), doc or class_doc, tuple(fields))
    for name, field in fields.items():
        readers = tuple(field.metadata.get("backbones", backbones))
        field_doc = docs.get(field.name, "")
        if dataclasses.is_dataclass(types[field.name]):
            yield from _walk(types[field.name], f"{name}.", field_doc, readers)
        else:
            yield Key(name, types[field.name], _default(field), field_doc, readers)


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


@cache
def _docs(module: str) -> Mapping[str, tuple[str, Mapping[str, str]]]:
    """Class name -> (its docstring, field name -> the docstring under the field)."""
    source = Path(sys.modules[module].__file__ or "")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    return {
        node.name: (_one_line(ast.get_docstring(node) or ""), _field_docs(node))
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def _field_docs(node: ast.ClassDef) -> dict[str, str]:
    docs: dict[str, str] = {}
    for field, after in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            docs[field.target.id] = _one_line(after.value.value)
    return docs


def _one_line(text: str) -> str:
    return " ".join(text.split())
