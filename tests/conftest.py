"""Shared by all tests: one thread for torch, so that parallel runs do not fight over cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama that transformers loads."""
    from tests.tiny_run import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")
