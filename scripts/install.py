"""Makes the virtual environment that the Makefile's commands run in.

    python scripts/install.py [--venv .venv] [--extras quickstart]
    python scripts/install.py --env verl                    # build it if need be, print its folder
    python scripts/install.py --env verl -- astuner ...     # the same, and run a command in it

Standard library only, so that it runs on a bare Python. Where no NVIDIA GPU is
seen, torch comes from the CPU index of its makers (where that can be reached),
which saves several GB. A second run with nothing changed returns at once.
Environments with a name (see named_env.py) are always those for CPUs.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import venv
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from named_env import NamedEnv

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "requirements" / "tested.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--extras", default="quickstart")
    parser.add_argument("--env", help="an environment with a name, as in requirements/")
    parser.add_argument("command", nargs="*", help="with --env, after --: what to run in it")
    args = parser.parse_args()
    if args.env:
        named(args.env, args.command)
    elif args.command:
        parser.error("a command can be given only with --env")
    else:
        project(args.venv, args.extras)


def project(folder: Path, extras: str) -> None:
    """The checkout's own environment, with astuner installed editable."""
    stamp = folder / f".installed-{extras}"
    wanted = fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    python = make_venv(folder)
    print("[1/2] installing torch", flush=True)
    pip(python, torch_requirement(CONSTRAINTS) or "torch", *torch_index(has_nvidia_gpu()))
    print(f"[2/2] installing astuner[{extras}]", flush=True)
    pip(python, "-c", str(CONSTRAINTS), "-e", f"{ROOT}[{extras}]")
    stamp.write_text(wanted)


def named(name: str, command: list[str]) -> None:
    """Build the environment if need be; run the command in it, or print its folder."""
    if platform.system() != "Linux" or not (3, 11) <= sys.version_info < (3, 13):
        sys.exit(
            f"The environment {name!r} needs Linux and Python 3.11 or 3.12; this is "
            f"{platform.system()} with {platform.python_version()}."
        )
    import named_env  # for Linux only: it locks files

    if name not in named_env.names():
        sys.exit(f"There is no environment {name!r}. There are: {', '.join(named_env.names())}.")
    env = named_env.locate(name)
    lock = named_env.use(env, build_named)
    if command:
        named_env.run_in(env, lock, command)
    print(env.folder)


def build_named(env: NamedEnv, lock: int) -> None:
    """Exactly the packages that are listed: only torch may bring what its build needs."""
    pins = str(env.requirements)
    torch = torch_requirement(env.requirements)
    size = "some minutes, 2 to 4 GB" if torch else "a minute or two, up to 1 GB"
    say(f"[0/2] making the environment {env.folder} (once; {size})")
    python = make_venv(env.folder)
    if torch:
        say("[1/2] installing torch")
        pip(python, "-c", pins, torch, *torch_index(gpu=False), inherit=(lock,))
    say(f"[2/2] installing {env.requirements.name}")
    pip(python, "--no-deps", "-r", pins, inherit=(lock,))


def say(text: str) -> None:
    """Standard output is for the folder's name alone."""
    print(text, file=sys.stderr, flush=True)


def fingerprint() -> str:
    """Changes with everything an installation depends on."""
    files = [ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__)]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def make_venv(folder: Path) -> Path:
    python = folder / ("Scripts/python.exe" if platform.system() == "Windows" else "bin/python")
    if not python.exists():
        say(f"making a virtual environment in {folder}")
        try:
            venv.create(folder, with_pip=True)
        except subprocess.CalledProcessError:
            sys.exit(
                "This Python cannot make a virtual environment (ensurepip is missing). "
                "On Debian or Ubuntu: apt install python3-venv"
            )
    return python


def torch_requirement(pins: Path) -> str | None:
    """The line of torch, in a list that has it."""
    lines = pins.read_text().splitlines()
    return next((line for line in lines if line.startswith("torch==")), None)


def torch_index(gpu: bool) -> list[str]:
    """Where pip should look for torch: the CPU builds, if there is no GPU to need more."""
    if platform.system() != "Linux" or gpu:
        return []
    try:
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5).close()
    except (urllib.error.URLError, OSError):
        return []  # pip's own index then decides; the build may be larger than needed
    return ["--extra-index-url", CPU_INDEX]  # 2.13.0+cpu sorts above 2.13.0


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def pip(python: Path, *arguments: str, inherit: tuple[int, ...] = ()) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments], pass_fds=inherit)
    if done.returncode:
        sys.exit(
            f"pip could not install {arguments[-1]!r}: see its message above. Check the network "
            "or your pip index settings and run the same command again; what was already "
            "downloaded is kept."
        )


if __name__ == "__main__":
    main()
