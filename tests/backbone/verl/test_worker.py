"""Groups as verl gets them: rows of tokens, what is dropped, and what ends the run."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from astuner import ModelTuner, Workflow, WorkflowOutput, WorkflowTask
from astuner.backbone.spawned.files import GroupRecord, SpoolReader, gave_up, last_sign
from astuner.backbone.verl.opening import as_verl_samples
from astuner.backbone.verl.worker import GroupDropped
from astuner.errors import ConfigError, EngineError, UserCodeError
from astuner.types import FailureKind
from tests.backbone.verl.verl_world import (
    ACTOR,
    OK,
    USER,
    FakeServers,
    answer,
    ask,
    job_config,
    opened,
    planned,
    play,
    prompt,
    verl_config,
    write,
)

pytest.importorskip("cloudpickle", reason="cloudpickle comes with astuner[verl]")


def spooled(folder: Path) -> list[GroupRecord]:
    return SpoolReader(folder).new()


# ---------------------------------------------------------------- tokens


async def test_rows_are_the_samples_tokens_with_mask_and_logprobs(tmp_path: Path) -> None:
    write(tmp_path, [planned(play(1.0, timelines=2), play(0.0))])
    servers = FakeServers()
    async with opened(tmp_path, servers) as worker:
        two, one = await ask(worker)
    between = [198, *USER, 87, *ACTOR]  # "\n", the user says "x"
    talk, critic = two
    assert talk.prompt_ids == prompt(64)  # "a"
    assert talk.response_ids == [*OK, *between, *OK]
    assert talk.response_mask == [1, 1, 1, *[0] * len(between), 1, 1, 1]
    assert talk.logprobs == [-0.25, -0.5, -0.75, *[0.0] * len(between), -0.25, -0.5, -0.75]
    assert (critic.prompt_ids, critic.response_ids) == (prompt(65), OK)
    assert critic.response_mask == [1, 1, 1]
    assert [r.num_turns for r in two] == [3, 3] and one[0].num_turns == 2
    [record] = spooled(tmp_path)
    samples = record.episodes[0].samples
    assert [r.prompt_ids + r.response_ids for r in two] == [s.token_ids.tolist() for s in samples]
    assert servers.loops == {asyncio.get_running_loop()}


async def test_each_row_says_the_weights_of_its_own_calls(tmp_path: Path) -> None:
    versions = iter([(3, 3), (4, 5), (6, 6)])
    write(tmp_path, [planned(play(1.0, timelines=2), "raise")])
    servers = FakeServers(lambda n: answer(OK, *next(versions)))
    async with opened(tmp_path, servers, verl_config("astuner", n=1)) as worker:
        [[talk, critic]] = await ask(worker, sessions=1)
        assert worker._engine.version == 6
    assert (talk.versions, critic.versions) == ((3, 5), (6, 6))
    [record] = spooled(tmp_path)
    calls = record.episodes[0].calls
    assert [c.weight_versions.tolist() for c in calls] == [[3, 3, 3], [4, 4, 5], [6, 6, 6]]


async def test_lengths_are_capped_in_all_lists_alike(tmp_path: Path) -> None:
    config = job_config()
    config.data.max_prompt_length, config.data.max_response_length = 53, 24
    write(tmp_path, [planned(play(1.0), play(0.0))], config=config)
    servers = FakeServers(lambda n: answer([70] * servers.calls[n][2]["max_tokens"]))
    async with opened(tmp_path, servers, verl_config(max_model_len=77)) as worker:
        [[row], _] = await ask(worker)
    # 52 + 8 tokens, 11 to the next reply (with the turn's end), and room for 6 of 8 until 77.
    assert sorted(c[2]["max_tokens"] for c in servers.calls) == [6, 6, 8, 8]
    assert (len(row.prompt_ids), len(row.response_ids)) == (52, 25)
    assert row.response_mask == [1] * 8 + [0] * 11 + [1] * 6
    assert len(row.logprobs) == len(row.scores) == 25
    assert [p != 0.0 for p in row.logprobs] == [m == 1 for m in row.response_mask]


# ---------------------------------------------------------------- advantages


async def test_scores_are_advantages_over_episodes_weighed_by_row(tmp_path: Path) -> None:
    """Rewards 1, 0, 0: mean 1/3, deviation sqrt(1/3); the first episode has 6 + 3 tokens."""
    write(tmp_path, [planned(play(1.0, timelines=2), play(0.0), play(0.0))])
    async with opened(tmp_path, FakeServers(), verl_config(n=3)) as worker:
        two, one, _ = await ask(worker, sessions=3)
    first, other = (2 / 3) / (3**-0.5 + 1e-6), (-1 / 3) / (3**-0.5 + 1e-6)
    zeros = [0.0] * 10
    assert two[0].scores == pytest.approx([2 / 3 * first] * 3 + zeros + [2 / 3 * first] * 3)
    assert two[1].scores == pytest.approx([first / 3] * 3)
    assert one[0].scores == pytest.approx([other] * 3 + zeros + [other] * 3)
    assert [two[0].reward, one[0].reward] == [1.0, 0.0]


@pytest.mark.parametrize(
    "mode", ["token-mean", "seq-mean-token-sum-norm", "seq-mean-token-sum"]
)  # the last is never ours: a raw setting
async def test_other_aggregations_leave_rows_as_they_are(tmp_path: Path, mode: str) -> None:
    write(tmp_path, [planned(play(1.0, timelines=2), play(0.0))])
    verl = verl_config(loss_agg_mode=mode)
    async with opened(tmp_path, FakeServers(), verl) as worker:
        two, _ = await ask(worker)
    advantage = 0.5 / (0.5**0.5 + 1e-6)
    assert two[0].scores[0] == pytest.approx(advantage)
    assert two[1].scores == pytest.approx([advantage] * 3)


async def test_verls_own_estimator_gets_the_reward_at_the_last_token(tmp_path: Path) -> None:
    write(tmp_path, [planned(play(1.0, timelines=2), play(0.5))])
    async with opened(tmp_path, FakeServers(), verl_config("grpo")) as worker:
        two, one = await ask(worker)
    assert two[0].scores == [0.0] * 15 + [1.0] and two[1].scores == [0.0, 0.0, 1.0]
    assert one[0].scores == [0.0] * 15 + [0.5]


async def test_rewards_by_target_need_advantages_that_know_targets(tmp_path: Path) -> None:
    by_target = play({"default": 1.0}), play({"default": 0.5})  # type: ignore[arg-type]
    write(tmp_path, [planned(*by_target)])
    async with opened(tmp_path, FakeServers()) as worker:
        better, worse = await ask(worker)
    advantage = 0.25 / (0.125**0.5 + 1e-6)
    assert better[0].scores[0] == pytest.approx(advantage)
    assert worse[0].scores[0] == pytest.approx(-advantage)
    async with opened(tmp_path, FakeServers(), verl_config("grpo")) as worker:
        told = await ask(worker)
    assert isinstance(told[0], ConfigError)
    assert "adv_estimator` compares episodes by one reward" in str(told[0])


# ---------------------------------------------------------------- groups


async def test_a_failed_episode_leaves_its_group_in_place(tmp_path: Path) -> None:
    write(tmp_path, [planned(play(1.0), "raise", play(0.0))])
    async with opened(tmp_path, FakeServers(), verl_config(n=3)) as worker:
        first, failed, third = await ask(worker, sessions=3)
    advantage = 0.5 / (0.5**0.5 + 1e-6)
    assert failed == []
    assert first[0].scores[0] == pytest.approx(advantage)
    assert third[0].scores[0] == pytest.approx(-advantage)
    [record] = spooled(tmp_path)
    assert (record.kept, record.step, record.group_id) == (True, 1, "s00001-t000")
    assert [e.ok for e in record.episodes] == [True, False, True]


@pytest.mark.parametrize("estimator", ["astuner", "grpo"])
@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (["raise", "raise"], "failed): 2 of 2 episodes failed, the first: Planned.execute raised"),
        ([play(1.0), "raise"], "single_survivor): 1 of 2 episodes failed, the first: Planned"),
        ([play(1.0, timelines=0)] * 2, "failed): no episode made an LLM call"),
    ],
)
async def test_a_useless_group_raises_once_and_leaves_no_row(
    tmp_path: Path, plan: list[Any], reason: str, estimator: str
) -> None:
    write(tmp_path, [planned(*plan)])
    async with opened(tmp_path, FakeServers(), verl_config(estimator)) as worker:
        first, second = await ask(worker)
        assert worker._shared == {}
    assert isinstance(first, GroupDropped) and reason in str(first)
    assert second == []
    [record] = spooled(tmp_path)
    assert not record.kept
    assert gave_up(tmp_path) is None


async def test_groups_that_teach_nothing_end_the_run(tmp_path: Path) -> None:
    """verl would ask for others for ever."""
    plan = [planned(play(1.0, timelines=0), play(1.0, timelines=0))]
    write(tmp_path, [*plan * 7, planned(play(1.0), play(0.0)), *plan * 8])
    async with opened(tmp_path, FakeServers()) as worker:
        assert worker._bench.rollout.settings.fail_fast_groups == 2
        outcomes = [(await ask(worker, index))[0] for index in range(16)]
    assert [type(o).__name__ for o in outcomes] == [
        *["GroupDropped"] * 7, "list", *["GroupDropped"] * 7, "UserCodeError"
    ]  # fmt: skip
    assert "8 groups in a row taught nothing" in str(outcomes[-1])
    error = gave_up(tmp_path)
    assert isinstance(error, UserCodeError) and "no episode made an LLM call" in str(error)


async def test_equal_rewards_stay_unless_sampling_is_dynamic(tmp_path: Path) -> None:
    tasks = [planned(play(1.0), play(1.0))] * 4
    write(tmp_path, tasks)
    async with opened(tmp_path, FakeServers()) as worker:
        [[row], _] = await ask(worker)
    assert set(row.scores) == {0.0}
    config = job_config()
    config.trainer_common.algorithm.dynamic_sampling = True
    config.trainer_common.algorithm.max_refill_rounds = 1
    write(tmp_path, tasks, config=config)
    async with opened(tmp_path, FakeServers()) as worker:
        outcomes = [(await ask(worker, index))[0] for index in range(3)]
        next_step = (await ask(worker, 3, step=2))[0]
    # One round replaces as many groups as the batch has, here 2; then they are kept.
    assert [type(o).__name__ for o in outcomes] == ["GroupDropped", "GroupDropped", "list"]
    assert isinstance(next_step, GroupDropped)


async def test_groups_are_named_and_seeded_by_their_place_in_the_data(tmp_path: Path) -> None:
    write(tmp_path, [planned(play(1.0), play(0.0))] * 4)
    servers = FakeServers()
    async with opened(tmp_path, servers) as worker:
        await ask(worker, 3, step=9)
    async with opened(tmp_path, again := FakeServers()) as worker:
        await ask(worker, 3, step=12)
    assert {r.group_id for r in spooled(tmp_path)} == {"s00002-t001"}
    assert {c[0] for c in servers.calls} == {"s00002-t001-e00", "s00002-t001-e01"}
    seeds = sorted(c[2]["seed"] for c in servers.calls)
    assert seeds == sorted(c[2]["seed"] for c in again.calls) and len(set(seeds)) == 4


# ---------------------------------------------------------------- validation


async def test_a_failed_validation_episode_is_a_masked_row_worth_nothing(tmp_path: Path) -> None:
    write(tmp_path, [planned("raise")], [planned(play(0.5, timelines=2, success=True), "raise")])
    verl = verl_config()
    verl.actor_rollout_ref.rollout.val_kwargs.n = 2
    servers = FakeServers()
    async with opened(tmp_path, servers, verl) as worker:
        [scored, failed] = await ask(worker, split="validation", step=4)
    assert [sum(r.scores) for r in scored] == [0.5, 0.5]
    assert scored[-1].info == {"failed": 0.0, "acc": 1.0}
    assert [(r.response_mask, r.scores, r.versions) for r in failed] == [([0], [0.0], (0, 0))]
    assert failed[0].info == {"failed": 1.0}
    assert {c[2]["temperature"] for c in servers.calls} == {0.0}
    [record] = spooled(tmp_path)
    assert (record.split, record.step, record.group_id) == ("validation", 4, "v00004-t000")


async def test_an_empty_validation_set_gives_a_masked_row(tmp_path: Path) -> None:
    write(tmp_path, [planned("raise")])
    async with opened(tmp_path, FakeServers()) as worker:
        [[row]] = await ask(worker, split="none", sessions=1)
    assert row.response_mask == [0] and spooled(tmp_path) == []


# ---------------------------------------------------------------- trouble


async def test_an_engine_error_is_tried_again_with_the_same_seed(tmp_path: Path) -> None:
    write(tmp_path, [planned(play(1.0), "raise")])
    script = [answer(OK[:1], stop_reason="aborted"), answer(), answer()]
    servers = FakeServers(lambda n: script[n])
    async with opened(tmp_path, servers, verl_config(n=1)) as worker:
        [[row]] = await ask(worker, sessions=1)
    assert row.response_ids[:3] == OK
    [record] = spooled(tmp_path)
    assert record.episodes[0].attempts == 2
    assert servers.calls[0][2]["seed"] == servers.calls[1][2]["seed"]
    assert record.counters["proxy/engine_errors"] == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (ValueError("no room"), "The engine failed: ValueError: no room"),
        (answer([]), "answered 0 tokens; 1 to 8 were due"),
        (answer(log_probs=None), "answered 3 tokens with 0 logprobs"),
        (answer(extra_fields={}), "did not say which weights it sampled with"),
    ],
)
async def test_a_server_that_cannot_be_trained_on_ends_the_run(
    tmp_path: Path, wrong: Any, says: str
) -> None:
    write(tmp_path, [planned(play(1.0), play(0.0))] * 2)
    servers = FakeServers(lambda n: wrong)
    async with opened(tmp_path, servers) as worker:
        first, sibling = await ask(worker, 0)
        assert isinstance(first, GroupDropped) and sibling == []
        assert gave_up(tmp_path) is None
        second, sibling = await ask(worker, 1)
    assert isinstance(second, EngineError) and sibling == []
    reason = gave_up(tmp_path)
    assert type(reason) is EngineError and says in str(reason)
    assert len(servers.calls) == 8  # 2 groups of 2 episodes, each tried twice
    [record] = spooled(tmp_path)  # of the first; the second ended the run
    failure = record.episodes[0].failure
    assert failure is not None and failure.kind is FailureKind.ENGINE and failure.retriable


async def test_a_workflow_that_never_works_ends_the_run_with_its_traceback(tmp_path: Path) -> None:
    write(tmp_path, [planned("raise", "raise")] * 2)
    async with opened(tmp_path, FakeServers()) as worker:
        await ask(worker, 0)
        raised, _ = await ask(worker, 1)
    reason = gave_up(tmp_path)
    assert isinstance(raised, UserCodeError) and str(reason) == str(raised)
    assert 'raise RuntimeError("the plan says so")' in str(reason)


class Leaves(Workflow):
    """Repeat 0 hangs up after a while, repeat 1 outstays its time with a call in the air."""

    def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
        way = tuner.as_oai_baseurl_apikey()
        patience = 0.3 if workflow_task.repeat_index == 0 else 60.0
        client = OpenAI(base_url=way.base_url, api_key=way.api_key, max_retries=0, timeout=patience)
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])
        return WorkflowOutput(reward=1.0)


async def test_abandoned_calls_are_cancelled_on_the_workers_loop(tmp_path: Path) -> None:
    config = job_config()
    config.rollout.episode_timeout = 5.0
    write(tmp_path, [planned()], workflow=Leaves, config=config)
    servers = FakeServers()
    servers.gate = asyncio.Event()
    async with opened(tmp_path, servers) as worker:
        dropped, _ = await ask(worker)
        deadline = time.monotonic() + 30
        while servers.cancelled < 2:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        servers.gate.set()
    assert isinstance(dropped, GroupDropped)
    [record] = spooled(tmp_path)
    kinds = [e.failure.kind for e in record.episodes if e.failure is not None]
    assert kinds == [FailureKind.WORKFLOW, FailureKind.TIMEOUT]
    assert [len(e.calls) for e in record.episodes] == [0, 0]


async def test_what_happens_is_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("astuner.backbone.spawned.files.SECONDS_BETWEEN_SIGNS", 0.0)
    write(tmp_path, [planned(play(1.0), "raise")])
    async with opened(tmp_path, FakeServers(), verl_config(n=1)) as worker:
        assert last_sign(tmp_path) == (0.0, "")
        await ask(worker, sessions=1)
    assert last_sign(tmp_path)[1] == "episode s00001-t000-e00 ended"


# ---------------------------------------------------------------- settings


def test_a_worker_samples_as_verl_is_told() -> None:
    verl = verl_config(workers=8, n=6, temperature=0.7, top_k=20)
    settings = as_verl_samples(job_config(), verl.actor_rollout_ref.rollout)
    assert (settings.num_repeat, settings.val_num_repeat, settings.seed) == (6, 1, 7)
    assert (settings.sampling.temperature, settings.sampling.top_k) == (0.7, 20)
    assert (settings.val_sampling.temperature, settings.val_sampling.top_k) == (0.0, 0)
    assert settings.sampling.max_tokens == 8


def test_no_thread_outlives_the_tests() -> None:
    """The watchdog's and the proxy's end with the worker."""
    deadline = time.monotonic() + 10
    while any(t.name == "astuner-proxy" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
