"""A YAML file with the line of every key.

`read_yaml` composes the file with PyYAML and keeps, for each dotted path below
the root key, where it stands and what was written there, so that any later
complaint can point at the line. Duplicate keys, a missing root key and broken
YAML are ConfigErrors here; which keys exist is not this module's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from astuner.config.keys import ROOT
from astuner.errors import ConfigError

_LOOKS_LIKE = {
    ROOT: f"""A configuration looks like this:

    {ROOT}:
      model: {{path: smollm2-135m}}
      rollout: {{user_workflow: my_package.my_module->MyWorkflow}}
""",
    "service": """A service's configuration looks like this:

    service:
      model: {path: smollm2-135m}
""",
}
_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)[eE][-+]?\d+$")


class Loader(yaml.SafeLoader):
    """Safe, and reads 1e-4 as a number (YAML 1.1 takes it for a text)."""


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back as the same value."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key was set, and the text that stands there if it is a plain scalar."""

    where: str
    """ "x.yaml:12" or "command line"."""
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """What one file says below the root key."""

    values: Mapping[Any, Any]
    places: Mapping[str, Place] = field(default_factory=dict[str, Place])
    """Dotted path below the root key -> its place."""


def read_yaml(path: Path, root: str = ROOT) -> Source:
    """The content of the file below its root key. Raises ConfigError."""
    node, data = _parse(_read_text(path), path, root)
    if not isinstance(data, dict) or root not in data:
        found = ", ".join(str(key) for key in cast("dict[Any, Any]", data or {}))
        seen = f"its root has: {found}" if isinstance(data, dict) and data else "it is empty"
        raise ConfigError(f"{path} has no root key `{root}` ({seen}). {_LOOKS_LIKE[root]}")
    below = cast("dict[Any, Any]", data)
    roots = {key.value: (key, value) for key, value in node.value}
    for name, (key, _) in roots.items():
        if name != root:
            raise ConfigError(
                f"{_where(path, key)}: unknown root key `{name}`. A file has one root key, "
                f"`{root}`; move what you need below it and remove the rest."
            )
    key, section = roots[root]
    values = below[root] if below[root] is not None else {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{_where(path, key)}: `{root}` must hold a mapping, not {values!r}. "
            f"{_LOOKS_LIKE[root]}"
        )
    return Source(cast("dict[Any, Any]", values), dict(_places(section, path)))


def parse_value(text: str) -> Any:
    """One YAML value, e.g. from the command line. Raises yaml.YAMLError."""
    return yaml.load(text, Loader)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml"))[:8]
        hint = f"{path.parent} has: {', '.join(near)}." if near else "No YAML file is near it."
        raise ConfigError(f"There is no configuration file {path}. {hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _parse(text: str, path: Path, root: str) -> tuple[yaml.Node, Any]:
    """The composed tree (merge keys already flattened) and the value it stands for."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{path} has no root key `{root}` (it is empty). {_LOOKS_LIKE[root]}")
        _refuse_duplicates(node, path, set())
        return node, loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path}{line}: not valid YAML: {error.problem or error.context}. "
            "Look at the indentation, the quotes and the colons on this line and the one before."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}.") from None
    finally:
        loader.dispose()


def _refuse_duplicates(node: yaml.Node, path: Path, seen: set[int]) -> None:
    """YAML would quietly take the last of two equal keys."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    first: dict[str, yaml.Node] = {}
    for child in node.value:
        if not isinstance(node, yaml.MappingNode):
            _refuse_duplicates(child, path, seen)
            continue
        key, value = child
        if isinstance(key, yaml.ScalarNode) and key.value in first:
            line = first[key.value].start_mark.line + 1
            raise ConfigError(
                f"{_where(path, key)}: `{key.value}` is already set on line {line}. "
                "Keep one of the two."
            )
        first[str(key.value)] = key
        _refuse_duplicates(value, path, seen)


def _places(node: yaml.Node, path: Path, prefix: str = "") -> Iterator[tuple[str, Place]]:
    if not isinstance(node, yaml.MappingNode) or prefix.count(".") > 20:
        return  # the depth bound is for an alias that contains itself
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        plain = isinstance(value, yaml.ScalarNode) and value.tag != "tag:yaml.org,2002:null"
        yield name, Place(_where(path, key), value.value if plain else None)
        yield from _places(value, path, f"{name}.")


def _where(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"
