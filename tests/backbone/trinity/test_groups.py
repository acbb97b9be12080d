"""One group in one of Trinity's runners: our proxy and runner over a sampler of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from astuner.backbone.spawned.answers import Answer
from astuner.backbone.spawned.files import SETTINGS, STOP, JobFile, SpoolReader, last_sign
from astuner.backbone.trinity.engine import TrinityEngine
from astuner.backbone.trinity.groups import train_rows, validation_task_rows
from astuner.backbone.trinity.opening import Desk, open_desk
from astuner.config.load import from_python
from astuner.engine.protocol import SamplingParams
from astuner.errors import UserCodeError
from astuner.task_reader import TaskSplits
from tests.tiny_run import EarlyLetters, FailsSometimes, tasks, tiny_job

pytest.importorskip("cloudpickle", reason="cloudpickle comes with astuner[trinity]")


class Sampler:
    """One letter a reply: "a" is worth 1, "z" 0, in turn; the weights are those of step 4."""

    def __init__(self, texts: str, encode: dict[str, int]) -> None:
        self.texts = texts
        self.encode = encode
        self.seeds: list[int | None] = []

    async def sample(self, prompt_ids: list[int], params: SamplingParams, limit: int) -> Answer:
        text = self.texts[len(self.seeds) % len(self.texts)]
        self.seeds.append(params.seed)
        return Answer([self.encode[text]], [-0.5], 4, 4)


@contextmanager
def opened(
    folder: Path, model: Path, texts: str, workflow: type = EarlyLetters
) -> Generator[tuple[Desk, Sampler]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    encode = {t: tokenizer.encode(t, add_special_tokens=False)[-1] for t in "az"}
    config = from_python(tiny_job(model, folder).config).config
    config.rollout.max_response_length_in_one_turn = 1
    (folder / SETTINGS).write_text(json.dumps({"explorer.runner_per_model": 2}))
    job = JobFile(config, workflow, None, TaskSplits(tasks(4), tasks(2)), folder)
    sampler = Sampler(texts, encode)
    with ExitStack() as stack:
        engine = TrinityEngine(sampler, asyncio.get_running_loop(), max_context=256)
        yield open_desk(folder, job, engine, str(model), stack), sampler


async def test_a_group_is_credited_and_handed_on(tmp_path: Path, tiny_model_dir: Path) -> None:
    with opened(tmp_path, tiny_model_dir, "az") as (desk, sampler):
        rows = await train_rows(desk, index=3, step=5, place=1)
    assert [r.told["rows"] for r in rows] == [4] * 4
    assert sorted(r.run for r in rows) == [0, 1, 2, 3]
    for row in rows:  # two of four episodes get 1: deviations of 0.5, divided by 0.577 (n - 1)
        assert row.advantages[-1] == pytest.approx(0.866 if row.reward == 1 else -0.866, abs=1e-3)
        assert (row.told["oldest"], row.action_mask) == (4, [True])
    assert len(set(sampler.seeds)) == 4 and None not in sampler.seeds
    [record] = SpoolReader(tmp_path).new()
    assert (record.step, record.split, record.kept, len(record.episodes)) == (5, "train", True, 4)
    assert record.episodes[0].task.main_query == "say 3"
    assert record.group_id == rows[0].told["group"]
    assert last_sign(tmp_path)[1]


async def test_rewards_all_alike_are_kept_as_zeros(tmp_path: Path, tiny_model_dir: Path) -> None:
    with opened(tmp_path, tiny_model_dir, "a") as (desk, _):
        rows = await train_rows(desk, index=0, step=1, place=0)
    assert [r.advantages for r in rows] == [[0.0]] * 4 and all(r.num_trained for r in rows)
    assert SpoolReader(tmp_path).new()[0].kept


async def test_failed_episodes_leave_no_row(tmp_path: Path, tiny_model_dir: Path) -> None:
    with opened(tmp_path, tiny_model_dir, "az", FailsSometimes) as (desk, _):
        rows = await train_rows(desk, index=0, step=1, place=0)
    assert sorted(r.run for r in rows) == [0, 2]
    assert SpoolReader(tmp_path).new()[0].episodes[1].failure is not None


class AlwaysFails(EarlyLetters):
    async def execute(self, workflow_task: object, tuner: object) -> object:  # type: ignore[override]
        raise ValueError("a bug")


async def test_when_nothing_works_the_run_ends(tmp_path: Path, tiny_model_dir: Path) -> None:
    with opened(tmp_path, tiny_model_dir, "az", AlwaysFails) as (desk, _):
        [row] = await train_rows(desk, index=0, step=1, place=0)
        assert row.num_trained == 0 and not SpoolReader(tmp_path).new()[0].kept
        with pytest.raises(UserCodeError, match="a bug"):
            await train_rows(desk, index=1, step=1, place=1)


async def test_once_the_run_is_over_nothing_is_played(tmp_path: Path, tiny_model_dir: Path) -> None:
    with opened(tmp_path, tiny_model_dir, "a") as (desk, sampler):
        (tmp_path / STOP).touch()
        [row] = await train_rows(desk, index=0, step=1, place=0)
        [of_validation] = await validation_task_rows(desk, index=0, step=1)
    assert (row.num_trained, of_validation.num_trained, sampler.seeds) == (0, 0, [])
    assert SpoolReader(tmp_path).new() == []


async def test_a_validation_task(tmp_path: Path, tiny_model_dir: Path) -> None:
    with opened(tmp_path, tiny_model_dir, "a") as (desk, _):
        rows = await validation_task_rows(desk, index=1, step=7)
    assert [(r.reward, r.num_trained) for r in rows] == [(1.0, 0)]
    [record] = SpoolReader(tmp_path).new()
    assert (record.step, record.split) == (7, "validation")
