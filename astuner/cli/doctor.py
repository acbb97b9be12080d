"""`astuner doctor`: what this machine has and which backbones can run on it.

Looks only; installs and starts nothing. Torch is asked about devices if it is
installed, everything else is read from package metadata.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

CORE = ("torch", "transformers", "peft", "renderers", "openai", "starlette")
OPTIONAL = {
    "reasoning-gym": "reasoning-gym",
    "math-verify": "math",
    "datasets": "datasets",
    "matplotlib": "plot",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "swanlab": "swanlab",
    "trackio": "trackio",
    "mlflow-skinny": "mlflow",
    "agentscope": "agentscope",
    "tinker": "tinker",
    "verl": "verl",
    "ray": "verl",
    "vllm": "verl",
    "trinity-rft": "trinity",
}
CPU_ENVIRONMENT = "python scripts/install.py --env {} (in a checkout)"


def installed(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def memory_gib() -> float | None:
    """Physical memory in GiB, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return None


def gpus() -> list[str]:
    """Name and memory of each CUDA device that torch sees."""
    if installed("torch") is None:
        return []
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in found]


def devices() -> str:
    """What torch could compute on."""
    if installed("torch") is None:
        return "torch is not installed"
    import torch

    found = gpus()
    if torch.backends.mps.is_available():
        found.append("Apple GPU (mps)")
    return ", ".join(found) or f"no GPU; CPU with {torch.get_num_threads()} threads"


def backbones() -> list[tuple[str, str, str]]:
    """(name, whether it can run here, what to do if not)."""
    missing = [package for package in CORE if installed(package) is None]
    runs = "no" if missing else "yes"
    mend = f"pip install {' '.join(missing)}" if missing else ""
    return [
        ("local", runs, mend),
        ("debug", runs, mend),
        ("tinker", *tinker_here(missing)),
        ("verl", *verl_here(len(gpus()))),
        ("trinity", *trinity_here(len(gpus()))),
    ]


def tinker_here(missing: Sequence[str]) -> tuple[str, str]:
    """Whether the model can be on a service; `missing` are packages of the core."""
    if missing or installed("tinker") is None:
        return "no", 'pip install "astuner\\[tinker]"'
    return "yes", "needs a service: service.base_url and a key in TINKER_API_KEY"


def verl_here(num_gpus: int) -> tuple[str, str]:
    """Whether verl can run on a machine with so many GPUs, and what to type."""
    there = all(installed(package) for package in ("verl", "ray"))
    if num_gpus == 0:
        if not there:
            return "no", f"to try it out on the CPU: {CPU_ENVIRONMENT.format('verl')}"
        return "to try out", "no GPU: the CPU is very slow; local trains better on it"
    if not there or not any(installed(engine) for engine in ("vllm", "sglang")):
        return "no", 'pip install "astuner\\[verl]"'
    return "yes", f"trainer_common.n_gpus_per_node={num_gpus} uses all GPUs here"


def trinity_here(num_gpus: int) -> tuple[str, str]:
    """Likewise for Trinity-RFT, which needs no GPU over astuner's own service."""
    there = all(installed(package) for package in ("trinity-rft", "ray", "tinker"))
    if not there:
        mend = CPU_ENVIRONMENT.format("trinity")
        return "no", 'pip install "astuner\\[trinity]"' if num_gpus else mend
    if num_gpus == 0 or not installed("vllm"):
        return "yes", "over astuner's own service; local is faster on one machine"
    return "yes", "its own engines were never tried by astuner's makers; verl was, on CPUs"


def doctor() -> int:
    """Print the report; 0 when the local backbone can run."""
    console = Console()
    memory = memory_gib()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    machine = Table(title="This machine", show_header=False)
    machine.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    machine.add_row("cores", str(os.cpu_count()))
    machine.add_row("memory", f"{memory:.1f} GiB" if memory else "unknown")
    machine.add_row("free disk here", f"{free:.1f} GiB")
    machine.add_row("devices", devices())
    console.print(machine)
    packages = Table("package", "version", "install with", title="Packages")
    for package in CORE:
        packages.add_row(package, installed(package) or "[red]missing[/]", "pip install astuner")
    for package, extra in OPTIONAL.items():
        line = f'pip install "astuner\\[{extra}]"'
        packages.add_row(package, installed(package) or "[dim]not installed[/]", line)
    console.print(packages)
    table = Table("backbone", "runs here", "what to do", title="Backbones")
    for row in backbones():
        table.add_row(*row)
    console.print(table)
    return 0 if backbones()[0][1] == "yes" else 4
