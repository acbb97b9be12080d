""" "pkg.mod->Name" or "path/to/file.py->Name" to the object, and back.

User code is imported here and nowhere else. What goes wrong inside it is shown
with the user's own frames; what is merely misspelt, with near names. Nothing is
called or instantiated, and no type is checked: that is for whoever asked.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from astuner.errors import LoadingError

ARROW = "->"
FILE_MODULE = "astuner_user_file_"
"""Modules loaded from a file get this prefix, the stem and a digest of the path as name."""


def load_object(path: str, what: str) -> Any:
    """The object that `path` names; `what` ("workflow", "judge", ...) is for messages.

    The working directory is put on `sys.path`, and for a file its folder too. A file is
    loaded once; the script that is running is not loaded a second time. Raises
    LoadingError.
    """
    module_part, arrow, name = path.partition(ARROW)
    module_part, name = module_part.strip(), name.strip()
    if not arrow or not module_part or not name:
        raise LoadingError(_malformed(path, what))
    _put_on_path(Path.cwd())
    is_file = module_part.endswith(".py") or "/" in module_part
    module = _load_file(module_part, path, what) if is_file else _load(module_part, path, what)
    return _attribute(module, name, path, what)


def object_path(obj: Any) -> str:
    """The path under which `load_object` finds this class or function again.

    Raises LoadingError for what cannot be found by name: instances, lambdas, local
    functions and classes, and what was defined in a notebook or an interactive session.
    """
    name = getattr(obj, "__qualname__", None)
    if not isinstance(name, str):
        raise LoadingError(
            f"{obj!r} is no class or function, so it cannot be named in a YAML file. "
            "Give its class, or a function that makes it."
        )
    if "<locals>" in name or "<lambda>" in name:
        raise LoadingError(
            f"{name} is defined inside a function, so no path leads to it. "
            "Move it to the top level of a .py file."
        )
    module = sys.modules.get(obj.__module__)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if module is None or found is not obj:
        raise LoadingError(
            f"{obj.__module__}{ARROW}{name} leads to {found!r}, not to the object given. "
            "Was it replaced by a decorator, or defined again? Give what the module holds."
        )
    if module.__name__ == "__main__" or module.__name__.startswith(FILE_MODULE):
        return f"{_file_of(module, name)}{ARROW}{name}"
    return f"{module.__name__}{ARROW}{name}"


# ---------------------------------------------------------------- modules


def _load(name: str, path: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise LoadingError(_no_module(error.name, path, what)) from None
        raise LoadingError(_raised(error, path, what)) from error
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise LoadingError(_raised(error, path, what)) from error


def _load_file(file: str, path: str, what: str) -> ModuleType:
    location = Path(file).expanduser().resolve()
    if not location.is_file():
        near = _near(location.name, (p.name for p in location.parent.glob("*.py")))
        raise LoadingError(f"The {what} {path!r}: there is no file {location}.{near}")
    main = sys.modules.get("__main__")
    main_file = getattr(main, "__file__", None)
    if main is not None and main_file and Path(main_file).resolve() == location:
        return main
    digest = hashlib.sha256(str(location).encode()).hexdigest()[:8]
    name = f"{FILE_MODULE}{location.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    _put_on_path(location.parent)
    return _execute(name, location, path, what)


def _execute(name: str, location: Path, path: str, what: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, location)
    if spec is None or spec.loader is None:
        raise LoadingError(f"The {what} {path!r}: {location} is no Python file (.py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # first, so that pickle and dataclasses find it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        del sys.modules[name]
        raise LoadingError(_raised(error, path, what)) from error
    return module


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _file_of(module: ModuleType, name: str) -> Path:
    file = getattr(module, "__file__", None)
    if not file or not Path(file).is_file():
        raise LoadingError(
            f"{name} is defined in a notebook or an interactive session, so no path leads to it. "
            "Move it into a .py file and import it from there."
        )
    return Path(file).resolve()


# ---------------------------------------------------------------- attributes and messages


def _attribute(module: ModuleType, name: str, path: str, what: str) -> Any:
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            owner = getattr(found, "__file__", None) or getattr(found, "__name__", repr(found))
            near = _near(part, (n for n in vars(found) if not n.startswith("_")))
            raise LoadingError(f"The {what} {path!r}: {owner} has no {part!r}.{near}") from None
    return found


def _malformed(path: str, what: str) -> str:
    module, _, name = path.replace(":", ".").rpartition(".")
    hint = f" Did you mean {module}{ARROW}{name}?" if module and name and ARROW not in path else ""
    return (
        f"The {what} {path!r} is not of the form package.module{ARROW}Name or "
        f"path/to/file.py{ARROW}Name.{hint}"
    )


def _no_module(missing: str, path: str, what: str) -> str:
    parent, _, leaf = missing.rpartition(".")
    folders = getattr(sys.modules.get(parent), "__path__", None) if parent else [str(Path.cwd())]
    near = _near(leaf, (module.name for module in pkgutil.iter_modules(folders or [])))
    where = f"in the package {parent}" if parent else f"from {Path.cwd()} or the environment"
    return (
        f"The {what} {path!r}: there is no module {missing!r} {where}.{near} Run from the "
        f"project's folder, install the package, or write path/to/file.py{ARROW}Name."
    )


def _near(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f" Did you mean {' or '.join(close)}?"
    return f" It has: {', '.join(names[:12])}." if names else ""


def _raised(error: BaseException, path: str, what: str) -> str:
    """The error with the user's frames: neither ours nor the import machinery's."""
    told = traceback.TracebackException.from_exception(error, lookup_lines=True)
    frames = [
        frame
        for frame in told.stack
        if frame.filename != __file__ and not frame.filename.startswith("<frozen importlib")
    ]
    told.stack = traceback.StackSummary.from_list(
        [f for f in frames if "/importlib/" not in f.filename]
    )
    told.__cause__ = told.__context__ = None
    shown = "".join(told.format(chain=False)).rstrip()
    if isinstance(error, SystemExit):
        shown += '\nGuard the script part with: if __name__ == "__main__":'
    if isinstance(error, ModuleNotFoundError):
        shown += f"\nInstall the missing package {error.name!r}, or mend the import."
    return f"The {what} {path!r} cannot be imported; its own code raised:\n{shown}"
