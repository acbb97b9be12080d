"""Which tasks verl is given, and how the run's end reaches its trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from astuner import Task
from astuner.backbone.spawned.files import FOLDER_VARIABLE, give_up
from astuner.backbone.verl.dataset import ENDLESS, TaskDataset
from astuner.backbone.verl.sections import TRAIN_FILES, VALIDATION_FILES
from astuner.errors import UserCodeError
from astuner.task_reader import TaskOrder
from tests.backbone.verl.verl_world import job_config, write

pytest.importorskip("cloudpickle", reason="cloudpickle comes with astuner[verl]")


def tasks(number: int) -> list[Task]:
    return [Task(task_id=str(n), main_query=f"say {n}") for n in range(number)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def load(files: str) -> TaskDataset:
    """As verl's `create_rl_dataset` does."""
    return TaskDataset(data_files=files, tokenizer=None, processor=None, config={}, max_samples=-1)


def test_rows_come_in_the_order_of_the_local_trainer(folder: Path) -> None:
    config = job_config()
    config.data.train_batch_size = 3
    write(folder, tasks(5), config=config)
    data = load(TRAIN_FILES)
    order = TaskOrder(5, 3, seed=7)
    rows = [data[p] for p in range(12)]
    assert [r["index"] for r in rows] == [i for step in range(4) for i in order.indices(step)]
    assert sorted(r["index"] for r in rows[:5]) == [0, 1, 2, 3, 4]
    assert rows[7]["raw_prompt"] == [{"role": "user", "content": f"say {rows[7]['index']}"}]
    assert (rows[7]["position"], rows[7]["split"]) == (7, "train")
    assert len(data) == ENDLESS and data[ENDLESS - 1]["position"] == ENDLESS - 1


def test_validation_is_cut_to_max_tasks(folder: Path) -> None:
    config = job_config()
    config.rollout.val_kwargs.max_tasks = 2
    write(folder, tasks(1), tasks(3), config=config)
    data = load(VALIDATION_FILES)
    rows = [data[n] for n in range(len(data))]
    assert [(r["index"], r["split"]) for r in rows] == [(0, "validation"), (1, "validation")]


def test_without_validation_tasks_there_is_one_row_of_nothing(folder: Path) -> None:
    write(folder, tasks(1))
    data = load(VALIDATION_FILES)
    assert (len(data), data[0]["split"]) == (1, "none")


def test_giving_up_is_raised_by_the_next_row(folder: Path) -> None:
    write(folder, tasks(1), tasks(1))
    data, validation = load(TRAIN_FILES), load(VALIDATION_FILES)
    assert data[0]["index"] == 0
    give_up(folder, UserCodeError("All 8 episodes failed"))
    with pytest.raises(UserCodeError, match="All 8 episodes failed"):
        data[1]
    assert validation[0]["index"] == 0


@pytest.mark.verl
def test_verls_loader_goes_on_where_a_saved_state_stood(folder: Path) -> None:
    from omegaconf import OmegaConf
    from torchdata.stateful_dataloader import (  # type: ignore[import-not-found]
        StatefulDataLoader,
    )
    from verl.trainer.ppo.utils import (  # type: ignore[import-not-found]
        create_rl_dataset,
        create_rl_sampler,
    )
    from verl.utils.dataset.rl_dataset import collate_fn  # type: ignore[import-not-found]

    write(folder, tasks(5))
    custom = {"path": "pkg://astuner.backbone.verl.dataset", "name": "TaskDataset"}
    config = OmegaConf.create({"custom_cls": custom, "shuffle": False})

    def loader() -> Any:
        dataset = create_rl_dataset(TRAIN_FILES, config, None, None)
        sampler = create_rl_sampler(config, dataset)
        return StatefulDataLoader(
            dataset=dataset, batch_size=1, collate_fn=collate_fn, sampler=sampler, drop_last=True
        )

    first = loader()
    rows = iter(first)
    seen = [next(rows)["position"][0] for _ in range(1003)]
    state = first.state_dict()
    assert seen == list(range(1003))
    second = loader()
    second.load_state_dict(state)
    assert next(iter(second))["position"].tolist() == [1003]
