"""What is shipped, where it is, and how to make a run of it small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = [*sorted(ROOT.glob("configs/*.yaml")), *sorted(ROOT.glob("tutorial/**/*.yaml"))]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("tutorial/**/*.md")),
]
SIDE_PAGES = [*sorted(ROOT.glob("envs/**/*.md")), ROOT / "benchmarks" / "README.md"]
"""Their commands need what only their own tests have (a service's end, other packages)."""
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
"""The real rows, on machines that have them."""

PROBLEMS = [
    {
        "question": f"Ann has {n} boxes of 12 eggs. How many eggs does she have?",
        "answer": f"There are {n} boxes.\n{n} * 12 = <<{n}*12={n * 12}>>{n * 12}\n#### {n * 12}",
    }
    for n in range(1, 7)
]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path, program: str) -> list[str]:
    """The lines of the page's bash blocks that begin with `program`, without comments."""
    lines = "".join(blocks(page, "bash")).splitlines()
    stripped = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [line for line in stripped if line.split()[:1] == [program]]


def tiny(model: Path, *, steps: int = 2) -> list[str]:
    """Overrides that make any run one of a few seconds."""
    return [
        f"model.path={model}",
        "model.dtype=float32",
        "model.device=cpu",
        "model.lora.rank=4",
        "data.train_batch_size=2",
        "rollout.num_repeat=2",
        "rollout.max_response_length_in_one_turn=6",
        "rollout.val_kwargs.max_tasks=2",
        f"trainer_common.total_steps={steps}",
    ]


def gsm8k_folder(folder: Path, rows: list[dict[str, str]]) -> list[str]:
    """Write rows as the two splits of a dataset, and the overrides that read them."""
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub = "task_reader.huggingface_dat_repo"
    return [f"{hub}.dataset_path={folder}", f"{hub}.dataset_name="]


def offline_datasets(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` asks no hub and leaves nothing behind."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()
