"""The agent loop inside verl: its worker and manager, TransferQueue, buffer and estimators."""

from __future__ import annotations

import asyncio
import importlib
import json
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from astuner.backbone.spawned.batches import BATCHES
from astuner.backbone.spawned.files import FOLDER_VARIABLE, SpoolReader, gave_up
from tests.backbone.verl.verl_world import OK, planned, play, prompt, write

pytestmark = [pytest.mark.verl, pytest.mark.xdist_group("ray")]
verl_loop: Any = None
HALF = 0.5**0.5
"""Of two rewards 1 and 0: half over the deviation."""


@pytest.fixture(scope="module", autouse=True)
def needs_verl() -> None:
    global verl_loop
    verl_loop = importlib.import_module("tests.backbone.verl.verl_loop")


# ---------------------------------------------------------------- one loop, without Ray


async def test_hydra_makes_loops_that_share_a_worker(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hydra  # type: ignore[import-not-found]
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer
    from verl.experimental.agent_loop.agent_loop import (  # type: ignore[import-not-found]
        DictConfigWrap,
        ToolListWrap,
    )

    from astuner.backbone.verl import agent_loop
    from astuner.backbone.verl.driver import with_loop

    ours = verl_loop.our_config(tiny_model_dir)
    config = verl_loop.verls_config(ours, tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    write(tmp_path, [planned(play(1.0, 2), "raise", play(0.0))], config=ours)
    tokenizer, servers = AutoTokenizer.from_pretrained(tiny_model_dir), verl_loop.Servers(config)
    [loops_file] = with_loop(tmp_path, {}).values()
    [registered] = OmegaConf.load(loops_file)

    def loop() -> Any:
        return hydra.utils.instantiate(
            config=registered,
            trainer_config=DictConfigWrap(config=config),
            server_manager=servers,
            tokenizer=tokenizer,
            processor=None,
            hf_model_type="llama",
            dataset_cls=object,
            data_config=DictConfigWrap(config.data),
            tools=ToolListWrap([]),
        )

    row = {"uid": "u", "split": "train", "index": 0, "position": 0, "global_steps": 1}
    row |= {"raw_prompt": [], "data_source": "astuner"}
    loops = [loop() for _ in range(3)]
    assert all(each.server_manager is servers for each in loops)
    try:
        work = (each.run({}, session_id=n, **row) for n, each in enumerate(loops))
        first, failed, third = await asyncio.wait_for(asyncio.gather(*work), 60)
    finally:
        agent_loop._opened.clear()
        agent_loop._stack.close()
    assert failed == [] and len(third) == 1
    talk, critic = (output.as_dict() for output in first)
    assert talk["prompts"].tolist() == prompt(64) and critic["responses"].tolist() == OK
    assert critic["rm_scores"].tolist() == pytest.approx([HALF / 3] * 3, abs=1e-5)
    assert critic["rollout_log_probs"].tolist() == [-0.25, -0.5, -0.75]
    assert critic["extra_fields"] == {
        "min_global_steps": 4,
        "max_global_steps": 4,
        "global_steps": 4,
        "reward_extra_info": {"failed": 0.0},
    }
    assert talk.keys() == critic.keys() and "token_scores" not in talk


def test_verls_mean_over_rows_is_ours_over_episodes() -> None:
    """The same loss as the local trainer's: 2 groups of 2, episodes of 1 to 3 timelines."""
    import torch
    from verl.trainer.ppo.core_algos import agg_loss  # type: ignore[import-not-found]

    from astuner.algorithm import AGGREGATIONS, resolve
    from astuner.algorithm.assign import weigh
    from astuner.backbone.verl.learning import AGGREGATIONS as VERLS
    from astuner.backbone.verl.outputs import advantage_rows
    from tests.backbone.verl.made_up import episodes_with_advantages

    given = episodes_with_advantages()
    everything = [s for _, samples in given for s in samples]
    generator = torch.Generator().manual_seed(0)
    ratios = [torch.rand(len(s.token_ids), generator=generator) for s in everything]
    for name, theirs in VERLS.items():
        weighed = weigh(everything, resolve(AGGREGATIONS, name), 16)
        ours = sum(
            float((torch.tensor(s.weights) * torch.tensor(s.advantages) * r).sum())
            for s, r in zip(weighed, ratios, strict=True)
        )
        rows = [row for e, samples in given for row in advantage_rows(e, samples, name)]
        width = max(len(row.response_ids) for row in rows)
        losses, masks = torch.zeros(len(rows), width), torch.zeros(len(rows), width)
        for n, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
            size = len(row.response_ids)
            losses[n, :size] = torch.tensor(row.scores) * ratio[-size:]
            masks[n, :size] = torch.tensor(row.response_mask)
        loss = agg_loss(
            losses,
            masks,
            theirs,
            batch_num_tokens=int(masks.sum()),
            global_batch_size=len(given),  # as verl is told: groups times num_repeat
            loss_scale_factor=16,
        )
        assert float(loss) == pytest.approx(ours, abs=1e-6), name


# ---------------------------------------------------------------- verl's manager and worker


TASKS = [
    planned(play(1.0, 2), play(0.0), play(0.5, 3)),
    planned(play(1.0), "raise", play(0.0)),
    planned("raise", "raise", play(1.0)),  # one survivor
    planned("raise", "raise", "raise"),
    planned(play(0.25), play(0.75), play(0.5)),
    planned(play(0.5), play(0.5), play(0.5)),
    planned(play(0.0), play(1.0), "raise"),
]


@pytest.fixture(scope="module")
def world(tiny_model_dir: Path) -> Generator[Callable[..., Any]]:
    """Ray, TransferQueue, and a maker of trainers over one agent loop worker each."""
    import ray  # type: ignore[import-not-found]
    import transfer_queue as tq  # type: ignore[import-not-found]
    from verl.trainer.ppo.v1.agent_loop_tq import (  # type: ignore[import-not-found]
        AgentLoopManagerTQ,
    )
    from verl.utils import hf_tokenizer  # type: ignore[import-not-found]

    # Paths of sockets are limited to about 100 characters, so pytest's folders are too deep.
    with (
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as short,
        pytest.MonkeyPatch.context() as patch,
    ):
        folder = Path(short) / "job"
        patch.setenv(FOLDER_VARIABLE, str(folder))
        ours = verl_loop.our_config(tiny_model_dir)
        ours.data.train_batch_size = 4
        write(folder, TASKS, [planned(play(0.5, 2, success=True)), planned("raise")], config=ours)
        environment = {
            "TRANSFER_QUEUE_ENABLE": "1",
            "VERL_USE_EXTERNAL_MODULES": "astuner.backbone.verl.plugin",
            "PYTHONPATH": str(Path(__file__).parents[3]),
            "OMP_NUM_THREADS": "1",
            FOLDER_VARIABLE: str(folder),
        }
        ray.init(
            num_cpus=6,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": environment},
            _temp_dir=str(Path(short) / "r"),
        )
        importlib.import_module("astuner.backbone.verl.plugin")
        tokenizer = hf_tokenizer(str(tiny_model_dir))
        base = verl_loop.verls_config(ours, folder, transfer_queue__enable=True)
        tq.init(base.transfer_queue)

        def make(**settings: Any) -> Any:
            config = verl_loop.verls_config(ours, folder, transfer_queue__enable=True, **settings)
            manager = AgentLoopManagerTQ.create(
                config=config,
                llm_client=verl_loop.Servers(config),
                teacher_client=None,
                reward_loop_worker_handles=[],
            )
            made = verl_loop.trainer(config, manager, tokenizer)
            made.folder = folder
            return made

        try:
            yield make
        finally:
            tq.close()
            ray.shutdown()


def sample(trainer: Any, number: int) -> Any:
    """Feed the loops and take a batch, as a step of verl's does."""
    trainer._add_prompts_to_generate(number)
    return trainer.replay_buffer.sample(1, "train", number)


def advantages(trainer: Any, meta: Any) -> dict[str, list[float]]:
    """verl's own advantages, of what it would train on."""
    import transfer_queue as tq

    keys, partition = meta.keys, meta.partition_id
    data = tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=["rollout_log_probs"])
    data["old_log_probs"] = data.pop("rollout_log_probs")
    tq.kv_batch_put(keys=keys, partition_id=partition, fields=data)
    trainer._compute_advantage(meta, {})
    rows = verl_loop.rows_of(meta)
    tq.kv_clear(keys=keys, partition_id=partition)
    return {name: row["advantages"] for name, row in sorted(rows.items())}


def noted(trainer: Any) -> list[tuple[list[str], list[str]]]:
    """What our sampler wrote down of each batch: verl's names of groups, taken and left out."""
    lines = (trainer.folder / BATCHES).read_text().splitlines()
    (trainer.folder / BATCHES).unlink()
    return [(line["groups"], line["left_out"]) for line in map(json.loads, lines)]


ONE = [1.0] * 3 + [0.0] * 10 + [1.0] * 3
"""The mask of a timeline with two replies; the other timelines have one."""


def times(advantage: float, mask: list[float] = ONE) -> Any:
    return pytest.approx([advantage * m for m in mask], abs=1e-5)


@pytest.mark.timeout(300)
def test_useless_groups_are_refilled_and_verls_grpo_compares_episodes(world: Any) -> None:
    trainer = world(algorithm__adv_estimator="grpo")
    meta, metrics = sample(trainer, 4)
    # Rows 2 and 3 gave nothing and were replaced by rows 4 and 5.
    assert metrics == {"training/rollout_failure/evicted_samples": 2}
    rows = verl_loop.rows_of(meta)
    scores = {name: sum(row["rm_scores"]) for name, row in rows.items()}
    assert scores == {
        **{"0/0/0": 1.0, "0/0/1": 1.0, "0/1/0": 0.0},
        **{"0/2/0": 0.5, "0/2/1": 0.5, "0/2/2": 0.5},
        **{"1/0/0": 1.0, "1/2/0": 0.0},
        **{"4/0/0": 0.25, "4/1/0": 0.75, "4/2/0": 0.5},
        **{"5/0/0": 0.5, "5/1/0": 0.5, "5/2/0": 0.5},
    }
    assert rows["0/0/1"]["input_ids"] == [*prompt(65), *OK]
    assert {tag["min_global_steps"] for tag in meta.tags} == {4}
    short = [1.0] * 3
    assert advantages(trainer, meta) == {
        # Rewards 1, 0, 0.5: mean 0.5 and deviation 0.5, whatever the number of timelines.
        **{"0/0/0": times(1.0), "0/0/1": times(1.0, short), "0/1/0": times(-1.0)},
        **{"0/2/0": times(0.0), "0/2/1": times(0.0, short), "0/2/2": times(0.0, short)},
        **{"1/0/0": times(HALF), "1/2/0": times(-HALF)},
        **{"4/0/0": times(-1.0), "4/1/0": times(1.0), "4/2/0": times(0.0)},
        **{"5/0/0": times(0.0), "5/1/0": times(0.0), "5/2/0": times(0.0)},
    }
    records = {r.group_id: r for r in SpoolReader(trainer.folder).new()}
    assert {name: r.kept for name, r in records.items()} == {
        **{"s00001-t000": True, "s00001-t001": True, "s00001-t002": False, "s00001-t003": False},
        **{"s00002-t000": True, "s00002-t001": True},
    }
    assert [e.ok for e in records["s00001-t002"].episodes] == [False, False, True]
    named = {r.name: name for name, r in records.items()}
    assert [[sorted(named[uid] for uid in uids) for uids in batch] for batch in noted(trainer)] == [
        [
            ["s00001-t000", "s00001-t001", "s00002-t000", "s00002-t001"],
            ["s00001-t002", "s00001-t003"],
        ]
    ]
    assert gave_up(trainer.folder) is None


@pytest.mark.timeout(300)
def test_our_estimator_passes_astuners_advantages_through(world: Any) -> None:
    trainer = world()
    meta, _ = sample(trainer, 4)
    short = [1.0] * 3
    assert advantages(trainer, meta) == {
        # Each row's share of its episode's 9 tokens; the third episode's advantage is 0.
        **{"0/0/0": times(2 / 3), "0/0/1": times(1 / 3, short), "0/1/0": times(-1.0)},
        **{"0/2/0": times(0.0), "0/2/1": times(0.0, short), "0/2/2": times(0.0, short)},
        **{"1/0/0": times(HALF), "1/2/0": times(-HALF)},
        **{"4/0/0": times(-1.0), "4/1/0": times(1.0), "4/2/0": times(0.0)},
        **{"5/0/0": times(0.0), "5/1/0": times(0.0), "5/2/0": times(0.0)},
    }
    assert len(noted(trainer)) == 1
    validation = trainer._validate()
    assert not (trainer.folder / BATCHES).exists()
    # One of two tasks succeeds with reward 0.5; the failed one counts as 0 in both.
    assert validation["val-core/astuner/acc/mean@1"] == 0.5
    assert validation["val-aux/astuner/reward/mean@1"] == 0.25
    assert validation["val-aux/astuner/failed/mean@1"] == 0.5


@pytest.mark.timeout(300)
def test_prompts_in_flight_are_asked_again_after_a_resume(world: Any) -> None:
    from types import SimpleNamespace

    trainer = world(
        trainer__v1__trainer_mode="separate_async",
        trainer__v1__sampler__max_off_policy_threshold=2,
    )
    manager = trainer.agent_loop_manager
    # The prompts are noted in TransferQueue, but the worker that had them is gone.
    trainer.agent_loop_manager = SimpleNamespace(generate_sequences=lambda batch: None)
    trainer._add_prompts_to_generate(3)
    trainer.agent_loop_manager, trainer.global_steps = manager, 2
    assert trainer._reissue_inflight_prompts() == 3
    meta, metrics = trainer.replay_buffer.sample(2, "train", 3)
    # Row 2 and its replacement, row 3, give nothing; row 4 does.
    assert {name.split("/")[0] for name in verl_loop.rows_of(meta)} == {"0", "1", "4"}
    assert metrics == {"training/rollout_failure/evicted_samples": 2}
    records = {r.group_id: r.step for r in SpoolReader(trainer.folder).new() if r.split == "train"}
    assert {name: step for name, step in records.items() if step == 2} == {
        **{f"s00001-t00{n}": 2 for n in range(4)},
        "s00002-t000": 2,
    }
    [(taken, left_out)] = noted(trainer)
    assert (len(taken), len(left_out)) == (3, 2)
