"""Environments with a name: complete, pinned, outside the checkout, shared by all checkouts.

`requirements/NAME.txt` lists every package of one; together with the Python it names the
folder in astuner's cache, so a changed list is another environment and an unchanged one is
never built twice. astuner itself is not in it: it is found through PYTHONPATH, so each
checkout runs its own code. A lock is held while an environment is built, and shared while it
is used; only a finished one has its stamp. Those that nothing used for a month are removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
KEEP_SECONDS = 30 * 24 * 3600
TESTED = "tested"
"""Not an environment: the versions that the checkout's own was tested with."""
LAYOUT = "1"
"""Raised when environments are built in another way, so that older ones are not taken."""

COMMAND = """#!{python}
import sys

try:
    from astuner.cli import script
except ModuleNotFoundError as error:
    if error.name != "astuner":
        raise
    sys.exit("astuner is not on PYTHONPATH. Set it to the checkout's folder, or use "
             "`python scripts/install.py --env {name} -- astuner ...`, which does.")
sys.exit(script())
"""


@dataclass(frozen=True)
class NamedEnv:
    """Where an environment is, or will be."""

    name: str
    requirements: Path
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.folder / ".complete"

    @property
    def ready(self) -> bool:
        return self.stamp.exists() and self.python.exists()


def names() -> list[str]:
    """The environments that can be had."""
    lists = (path.stem for path in (ROOT / "requirements").glob("*.txt"))
    return sorted(name for name in lists if name != TESTED)


def locate(name: str, cache: Path | None = None) -> NamedEnv:
    """The environment's place: by its list of packages and this Python, by nothing else."""
    requirements = ROOT / "requirements" / f"{name}.txt"
    pins = sorted(
        line.strip()
        for line in requirements.read_text().splitlines()
        if line.strip() and not line.startswith("#")
    )
    python = f"{platform.python_implementation()} {platform.python_version()} {platform.machine()}"
    key = hashlib.sha256("\n".join([LAYOUT, python, *pins]).encode()).hexdigest()[:12]
    return NamedEnv(name, requirements, (cache or cache_folder()) / f"{name}-{key}")


def cache_folder() -> Path:
    """Beside the models that astuner has fetched."""
    if named := os.environ.get("ASTUNER_CACHE"):
        return Path(named).expanduser().absolute() / "envs"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "astuner" / "envs"


def use(env: NamedEnv, build: Callable[[NamedEnv, int], None]) -> IO[str]:
    """Build the environment if it is not there; its shared lock, for as long as it is used.

    `build` fills the folder; what it starts should inherit the lock's descriptor, so that
    the folder stays locked until nothing writes to it any more. If the build fails or is
    killed there is no stamp, and the next one that wants the environment starts anew.
    """
    env.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(_lock_of(env.folder), "a")  # noqa: SIM115 - stays open while the environment is used
    while True:
        _wait_for_builder(lock, env)
        if env.ready:
            env.stamp.touch()
            prune(env.folder.parent, keep=env.folder)
            return lock
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not env.ready:
            shutil.rmtree(env.folder, ignore_errors=True)
            build(env, lock.fileno())
            _write_command(env)
            os.sync()  # the stamp must not outlive a power cut that the packages did not
            env.stamp.touch()


def _wait_for_builder(lock: IO[str], env: NamedEnv) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{env.folder} is being built by another process; waiting", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_SH)


def _write_command(env: NamedEnv) -> None:
    path = env.folder / "bin" / "astuner"
    path.write_text(COMMAND.format(python=env.python, name=env.name))
    path.chmod(0o755)


def prune(cache: Path, *, keep: Path, older_than: float = KEEP_SECONDS) -> list[Path]:
    """Remove the environments that nothing has used for long, and return their folders."""
    removed: list[Path] = []
    for folder in cache.iterdir():
        if not folder.is_dir() or folder == keep or _unused_seconds(folder) < older_than:
            continue
        with open(_lock_of(folder), "a") as lock, suppress(BlockingIOError):  # in use: not now
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / ".complete").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _unused_seconds(folder: Path) -> float:
    stamp = folder / ".complete"
    return time.time() - (stamp if stamp.exists() else folder).stat().st_mtime


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _here(path: Path) -> str:
    """The path as one would type it in this folder."""
    whole, here = path.resolve(), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)


def run_in(env: NamedEnv, lock: IO[str], command: list[str]) -> None:
    """Become the command, inside the environment, with this checkout's astuner. Never returns."""
    os.set_inheritable(lock.fileno(), True)
    paths = {"PATH": str(env.folder / "bin"), "PYTHONPATH": str(ROOT)}
    variables = os.environ | {
        name: os.pathsep.join(filter(None, [first, os.environ.get(name)]))
        for name, first in paths.items()
    }
    variables["VIRTUAL_ENV"] = str(env.folder)
    script = _here(ROOT / "scripts" / "install.py")
    variables["ASTUNER_COMMAND"] = f"python {script} --env {env.name} -- astuner"
    variables.pop("PYTHONHOME", None)
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, variables)
    except FileNotFoundError:
        sys.exit(f"There is no command {command[0]!r}, neither in {env.folder} nor on PATH.")
