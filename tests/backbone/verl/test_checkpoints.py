"""Which checkpoints stay, by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from astuner.backbone.spawned.keeping import steps_in, surplus
from astuner.backbone.verl import checkpoints
from astuner.backbone.verl.checkpoints import OnlyWanted
from astuner.config.load import load_config


@pytest.mark.parametrize(
    ("steps", "now", "every", "keep", "gone"),
    [
        ([1, 2], 2, 20, 2, [1]),  # rolling: only the newest
        ([20, 21], 21, 20, 2, []),
        ([20, 40, 59, 60], 60, 20, 2, [20, 59]),  # lasting: the newest two
        ([20, 40, 60], 60, 20, 0, []),  # 0 keeps all
        ([3, 6, 9], 9, 0, 2, [3, 6]),  # no lasting ones
        ([20, 99, 100], 100, 30, 1, [20, 99]),  # the last step lasts, whatever the interval
        ([10, 20, 30], 20, 10, 1, [10]),  # a run that was wound back: 30 is not its own
    ],
)
def test_surplus(steps: list[int], now: int, every: int, keep: int, gone: list[int]) -> None:
    assert surplus(steps, now, every=every, keep=keep, last=100) == gone


def test_the_surplus_is_deleted_after_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["trainer_common.save_freq=2", "trainer_common.keep_checkpoints=1"]
    config = load_config(None, settings).config
    monkeypatch.setattr(checkpoints, "folder_of_process", lambda: tmp_path)
    monkeypatch.setattr(checkpoints, "read_job", lambda _: SimpleNamespace(config=config))
    for step in (2, 3, 4, 5):
        (tmp_path / f"global_step_{step}" / "actor").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    verl = SimpleNamespace(trainer=SimpleNamespace(total_training_steps=9))
    OnlyWanted(verl).on_save(None, 5, str(tmp_path / "global_step_5"), async_save=False)
    assert steps_in(tmp_path) == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "global_step_4",
        "global_step_5",
        "latest_checkpointed_iteration.txt",
    ]
