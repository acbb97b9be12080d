"""YAML, overrides and defaults to one checked `AstunerConfig`, with the origin of every key.

`load_config` refuses what the schema does not know and what cannot be, naming
the key, the value, its place and the nearest valid name; all problems of a file
are reported at once. It neither looks at the disk beyond the file nor imports
user code, so whether a path exists is found out by whoever opens it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from astuner.config.check import value_problems
from astuner.config.keys import ROOT, RUN, Table, get, keys
from astuner.config.loaded import COMMAND_LINE, DEFAULT, PYTHON, LoadedConfig, Origin, joined
from astuner.config.overrides import parse_override
from astuner.config.readers import check_backbone, check_complete
from astuner.config.schema import AstunerConfig
from astuner.config.source import Dumper, Place, Source, parse_value, read_yaml
from astuner.errors import ConfigError

__all__ = [
    "LoadedConfig",
    "check_backbone",
    "check_complete",
    "dump_config",
    "from_python",
    "load_config",
]

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class _Setting:
    """One leaf to set: from a line of the file, or from the command line."""

    name: str
    value: Any
    origin: Origin
    text: str | None = None


class _Build:
    """A configuration in the making, and all that was wrong so far."""

    def __init__(self, table: Table = RUN) -> None:
        self.table = table
        self.tree: DictConfig = OmegaConf.structured(table.root_class)
        self.origins: dict[str, Origin] = dict.fromkeys(table.keys, DEFAULT)
        self.problems: list[str] = []


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    backbone: str | None = None,
    experiment_dir: str | None = None,
) -> LoadedConfig:
    """Read the YAML file (None: defaults only), then apply the overrides in order.

    `backbone` and `experiment_dir` are the command line's own options; they win over
    the overrides. An experiment name of "auto" becomes the file's stem. Raises
    ConfigError with every problem found.
    """
    path = None if path is None else Path(path)
    build = _Build()
    settings = _settings(build, path, overrides)
    for name, value in (("backbone", backbone), ("experiment_dir", experiment_dir)):
        if value is not None:
            settings.append(_Setting(name, value, COMMAND_LINE))
    for setting in settings:
        _apply(build, setting)
    return _finish(build, path)


def load_table(
    table: Table, path: Path | None, overrides: Sequence[str]
) -> tuple[Any, Mapping[str, Origin]]:
    """The configuration of another schema, an object of its class, and where each key came
    from. Raises ConfigError with every problem found."""
    build = _Build(table)
    for setting in _settings(build, path, overrides):
        _apply(build, setting)
    _resolve(build)
    if build.problems:
        raise ConfigError(joined(build.problems))
    return getattr(OmegaConf.to_object(build.tree), table.root), build.origins


def _settings(build: _Build, path: Path | None, overrides: Sequence[str]) -> list[_Setting]:
    """What the file and the overrides set, in the order of precedence."""
    source = Source({}) if path is None else read_yaml(path, build.table.root)
    settings = [
        leaf
        for name, value in source.values.items()
        for leaf in _leaves(str(name), value, source.places, build)
    ]
    for text in overrides:
        name, value = parse_override(text, build.table)
        settings += _leaves(name, value, {}, build, COMMAND_LINE)
    return settings


def from_python(config: AstunerConfig, path: Path | None = None) -> LoadedConfig:
    """A configuration built in Python, checked like one from a file. Raises ConfigError."""
    build = _Build()
    for name, key in keys().items():
        value = get(config, name)
        if value != key.default:
            _apply(build, _Setting(name, _escape(value), PYTHON))
    return _finish(build, path)


def dump_config(config: AstunerConfig, path: str | Path) -> None:
    """Write what differs from the defaults, plus the essentials (backbone, model, workflow
    and the reader's type). Loading the file gives an equal configuration; only an
    experiment name of "auto" becomes the file's stem. Raises ConfigError if it cannot be
    written."""
    path = Path(path)
    tree: dict[str, Any] = {}
    for name, key in keys().items():
        value = get(config, name)
        if value != key.default or (name in _ESSENTIAL and value != ""):
            *parents, leaf = name.split(".")
            section = tree
            for parent in parents:
                section = section.setdefault(parent, {})
            section[leaf] = _escape(value)
    text = _to_yaml({ROOT: tree})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The configuration cannot be written to {path}: {error}.") from error


def _to_yaml(tree: Mapping[str, Any]) -> str:
    text = yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    if parse_value(text) == tree:
        return text
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False)  # some control characters need escapes


_ESSENTIAL = ("backbone", "model.path", "rollout.user_workflow", "task_reader.type")


# ---------------------------------------------------------------- from nested to leaves


def _leaves(
    name: str,
    value: Any,
    places: Mapping[str, Place],
    build: _Build,
    origin: Origin | None = None,
) -> Iterator[_Setting]:
    """The leaves below `name`; an override may hold a whole section too. Without an
    `origin`, each comes from its place in the file."""
    table, problems = build.table, build.problems
    place = places.get(name)
    at = origin or Origin("file", place.where if place else "")
    if name in table.keys or table.open_parent(name):
        yield _Setting(name, value, at, place.text if place else None)
    elif name not in table.sections:
        problems.append(_unknown(name, at, table))
    elif isinstance(value, dict):
        for child, below in cast("dict[Any, Any]", value).items():
            yield from _leaves(f"{name}.{child}", below, places, build, origin)
    elif value is not None:  # an empty section, its lines commented out, is fine
        children = ", ".join(child.rpartition(".")[2] for child in table.sections[name].children)
        problems.append(
            f"{at}: `{table.full(name)}` is a section, not a value, but {value!r} was given. "
            f"Its keys are: {children}."
        )


def _unknown(name: str, at: Origin, table: Table) -> str:
    near = table.nearest(name)
    if near is not None:
        return f"{at}: unknown key `{table.full(name)}`; did you mean `{table.full(near)}`?"
    parent = name.rpartition(".")[0]
    while parent not in table.sections:
        parent = parent.rpartition(".")[0]
    children = ", ".join(child.rpartition(".")[2] for child in table.sections[parent].children)
    return f"{at}: unknown key `{table.full(name)}`. `{table.full(parent)}` has: {children}."


# ---------------------------------------------------------------- onto the schema


def _apply(build: _Build, setting: _Setting) -> None:
    full = build.table.full
    key = build.table.keys.get(setting.name) or build.table.open_parent(setting.name)
    assert key is not None  # _leaves yields known keys only
    value = setting.value
    if key.type is str and setting.text is not None:
        value = setting.text  # `experiment_name: 007` is the text that stands there
    if key.type in (int, float, bool) and value == "":
        value = None
    try:
        OmegaConf.update(build.tree, full(setting.name), value)
    except GrammarParseError:
        build.problems.append(
            f"{setting.origin}: `{full(setting.name)}` has a malformed interpolation: {value!r}. "
            "Write ${oc.env:NAME}, or \\${ for the characters themselves."
        )
    except (OmegaConfBaseException, TypeError, ValueError):
        shown = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
        build.problems.append(
            f"{setting.origin}: `{full(setting.name)}` must be {key.type_name}, but is {shown}."
        )
    else:
        build.origins[key.name] = setting.origin


def _finish(build: _Build, path: Path | None) -> LoadedConfig:
    _resolve(build)
    if build.problems:
        raise ConfigError(joined(build.problems))
    config = cast(AstunerConfig, getattr(OmegaConf.to_object(build.tree), ROOT))
    if config.experiment_name == AUTO and path is not None:
        config.experiment_name = path.stem
    problems = [
        f"{', '.join(f'{build.origins[name]}' for name in names)}: {message}"
        for names, message in value_problems(config)
    ]
    if problems:
        raise ConfigError(joined(problems))
    return LoadedConfig(config, build.origins, path)


def _resolve(build: _Build) -> None:
    """Read every value once, so that a bad `${...}` is reported with its key and place."""
    full = build.table.full
    for name, key in build.table.keys.items():
        try:
            value = OmegaConf.select(build.tree, full(name), throw_on_missing=True)
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except InterpolationResolutionError as error:
            reason = str(error).partition("\n")[0]
            build.problems.append(
                f"{build.origins[name]}: `{full(name)}` (must be {key.type_name}) has an "
                f"interpolation that cannot be resolved: {reason}. Set the variable, or give a "
                "default: ${oc.env:NAME,default}."
            )
        except OmegaConfBaseException:
            build.problems.append(f"{build.origins[name]}: `{full(name)}` has no value ('???').")


def _escape(value: Any) -> Any:
    """Keep a literal `${` in a text from being taken for an interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # backslashes before it count in pairs
    if isinstance(value, dict):
        return {k: _escape(v) for k, v in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_escape(v) for v in cast("list[Any]", value)]
    return value
