"""Makes the virtual environment that the Makefile's commands run in.

Standard library only, so that it runs on a bare Python. Where no NVIDIA GPU is
seen, torch comes from the CPU index of its makers (where that can be reached),
which saves several GB. A second run with nothing changed returns at once.
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

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "requirements" / "tested.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--extras", default="quickstart")
    args = parser.parse_args()
    stamp = args.venv / f".installed-{args.extras}"
    wanted = fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    python = make_venv(args.venv)
    print("[1/2] installing torch", flush=True)
    pip(python, torch_requirement(), *torch_index())
    print(f"[2/2] installing astuner[{args.extras}]", flush=True)
    pip(python, "-c", str(CONSTRAINTS), "-e", f"{ROOT}[{args.extras}]")
    stamp.write_text(wanted)


def fingerprint() -> str:
    """Changes with everything an installation depends on."""
    files = [ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__)]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def make_venv(folder: Path) -> Path:
    python = folder / ("Scripts/python.exe" if platform.system() == "Windows" else "bin/python")
    if not python.exists():
        print(f"[0/2] making a virtual environment in {folder}", flush=True)
        try:
            venv.create(folder, with_pip=True)
        except subprocess.CalledProcessError:
            sys.exit(
                "This Python cannot make a virtual environment (ensurepip is missing). "
                "On Debian or Ubuntu: apt install python3-venv"
            )
    return python


def torch_requirement() -> str:
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))


def torch_index() -> list[str]:
    """Where pip should look for torch: the CPU builds, if there is no GPU to need more."""
    if platform.system() != "Linux" or has_nvidia_gpu():
        return []
    try:
        urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5).close()
    except (urllib.error.URLError, OSError):
        return []  # pip's own index then decides; the build may be larger than needed
    return ["--extra-index-url", CPU_INDEX]  # 2.13.0+cpu sorts above 2.13.0


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments])
    if done.returncode:
        sys.exit(
            f"pip could not install {arguments[-1]!r}: see its message above. Check the network "
            "or your pip index settings and run the same command again; what is already "
            "installed is kept."
        )


if __name__ == "__main__":
    main()
