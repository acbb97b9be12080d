"""From an environment's name to what makes it.

Three kinds of name: a folder of `envs/` ("toy_text", looked for in the working directory
and beside the package), "pkg.mod->Class" or "path/to/file.py->Class", and an id of
`gymnasium.make` ("FrozenLake-v1"). Loading is lazy; a name that leads nowhere is a
ConfigError that lists what there is.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from astuner.env.gymnasium_text import gymnasium_ids, gymnasium_maker
from astuner.env.protocol import EnvMaker
from astuner.env.served_class import ServedClass
from astuner.errors import ConfigError, MissingDependency
from astuner.loading import ARROW, load_object

FOLDER_FILE = "environment.py"
MAKER = "make"
"""What an environment folder's file must define: a class or function `(task_id, params)`."""


def find_environment(name: str) -> EnvMaker:
    """The environment's maker. Raises ConfigError, LoadingError or MissingDependency."""
    if ARROW in name:
        return adapted(load_object(name, "environment"), name)
    folder = environment_folders().get(name)
    if folder is not None:
        return adapted(_load_folder(folder), name)
    try:
        known = gymnasium_ids()
    except MissingDependency as error:
        raise ConfigError(f"{_unknown(name, list(environment_folders()))} {error}") from None
    if name in known or ":" in name:
        return gymnasium_maker(name)
    raise ConfigError(_unknown(name, [*environment_folders(), *known]))


def environment_folders() -> dict[str, Path]:
    """The folders of `envs/` by name; those of the working directory come first."""
    places = [Path.cwd() / "envs", Path(__file__).resolve().parents[2] / "envs"]
    found: dict[str, Path] = {}
    for place in places:
        for file in sorted(place.glob(f"*/{FOLDER_FILE}")):
            found.setdefault(file.parent.name, file.parent)
    return found


def _load_folder(folder: Path) -> Any:
    """What the folder's file defines. The folder is a package, so that its files may import
    each other; its name keeps those of two places apart."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    package = f"astuner_environment_{folder.name}_{digest}"
    if package not in sys.modules:
        module = ModuleType(package)
        module.__path__ = [str(folder)]
        sys.modules[package] = module
    file = FOLDER_FILE.removesuffix(".py")
    return load_object(f"{package}.{file}{ARROW}{MAKER}", "environment")


def described(folder: Path) -> str:
    """The first line of the folder's docstring, without running it."""
    tree = ast.parse((folder / FOLDER_FILE).read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def adapted(obj: Any, name: str) -> EnvMaker:
    """A class or function as a maker of TextEnvs: Gymnasium environments get text, and the
    classes of an AgentScope Tuner env service are taken as they are.

    Raises ConfigError for what is neither.
    """
    if not callable(obj):
        raise ConfigError(f"The environment {name!r} is {obj!r}; it must be a class or function.")
    if hasattr(obj, "get_init_state"):
        return _served_maker(cast(Callable[..., Any], obj))
    if inspect.isclass(obj) and _is_gymnasium(obj):
        return gymnasium_maker(name, obj)
    return cast(EnvMaker, obj)


def _served_maker(cls: Callable[..., Any]) -> EnvMaker:
    def make(task_id: str, params: dict[str, Any]) -> ServedClass:
        return ServedClass(cls, task_id, params)

    if hasattr(cls, "get_query_list"):
        make.task_ids = lambda split: cls.get_query_list(split)  # pyright: ignore
    return make


def _is_gymnasium(cls: type) -> bool:
    return any(base.__module__.startswith("gymnasium.") for base in cls.__mro__)


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"There is no environment {name!r}.{hint} Give a folder of envs/ "
        f"({', '.join(sorted(environment_folders())) or 'none here'}), an id of gymnasium.make, "
        f"or package.module{ARROW}Class; `astuner env list` shows what there is."
    )
