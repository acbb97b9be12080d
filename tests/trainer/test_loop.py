"""The loop on a bandit: order of verbs, skips, stops, resumes, and trouble."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from astuner.errors import CheckpointError, ConfigError, DeadlineExceeded, EngineError
from astuner.trainer import Checkpoints, EvalResult, TrainResult, TrainSettings, train

from .toys import (
    BanditSource,
    Log,
    ScriptedSource,
    ToyPolicy,
    chance_of_success,
    group,
    settings,
)

GOOD = [group("a", [1.0, 0.0]), group("b", [0.0, 1.0])]
SAME = [group("c", [0.5, 0.5]), group("d", [0.0, 0.0])]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it."""


async def run(
    folder: Path, policy: ToyPolicy, source: Any, told: TrainSettings, **more: Any
) -> TrainResult:
    more.setdefault("checkpoints", Checkpoints(folder, keep=2))
    evaluate = more.pop("evaluate", chance_of_success(policy))
    return await asyncio.wait_for(train(policy, source, evaluate, told, **more), timeout=60)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- a plain run


async def test_the_order_of_a_run(tmp_path: Path) -> None:
    policy, log = ToyPolicy(), Log()
    source = ScriptedSource({1: GOOD, 2: GOOD}, counted={"rollout/retries": 1.0})
    told = settings(total_steps=2, save_freq=1, test_freq=1, val_before_train=True)
    result = await run(tmp_path, policy, source, told, sinks=log, episodes=log, progress=log)
    assert policy.verbs == ["forward_backward", "optim_step", "publish", "save"] * 2
    assert source.asked == [1, 2]
    assert source.published == [1, 2]
    assert log.stages == ["eval 0/2"] + [
        f"{stage} {step}/2"
        for step in (1, 2)
        for stage in ("rollout", "train", "publish", "checkpoint", "eval")
    ]
    assert log.stored == [(1, 4), (2, 4)]
    assert [step for step, _ in log.rows] == [0, 1, 1, 2, 2]
    assert log.rows[0][1].keys() == {"eval/score", "eval/num", "eval/entropy", "seconds/eval"}
    metrics = log.rows[3][1]
    assert metrics["tokens/sampled"] == metrics["tokens/trained"] == 4
    assert metrics["total/tokens_sampled"] == 8
    assert metrics["rollout/retries"] == 1
    assert metrics["staleness/mean"] == 1  # scripted tokens are of version 0
    assert metrics["policy/lr"] == 0.5
    assert {"seconds/rollout", "seconds/train", "seconds/publish"} <= metrics.keys()
    assert (result.steps, result.stopped) == (2, False)
    assert result.totals.tokens_trained == 8
    assert result.totals.tokens_masked_by_reason == {"context": 8}
    assert result.checkpoint == tmp_path / "checkpoint-000002"
    assert sorted(result.evals) == [0, 1, 2]


async def test_it_learns(tmp_path: Path) -> None:
    policy = ToyPolicy()
    told = settings(total_steps=20, val_before_train=True, lr=0.3)
    result = await run(tmp_path, policy, BanditSource(policy), told)
    assert result.eval_before is not None and result.eval_after is not None
    assert result.eval_before.score == pytest.approx(0.2)
    assert result.eval_after.score > 0.9
    assert result.best_eval == (20, result.eval_after)


async def test_when_it_validates_and_saves(tmp_path: Path) -> None:
    policy = ToyPolicy()
    told = settings(total_steps=5, save_freq=2, test_freq=2)
    result = await run(tmp_path, policy, BanditSource(policy), told)
    assert sorted(result.evals) == [2, 4, 5]
    assert names(tmp_path) == ["checkpoint-000004", "checkpoint-000005"]
    assert result.eval_before is None


async def test_rolling_checkpoints_between_the_lasting_ones(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    async def look(step: int) -> None:
        seen.append(names(tmp_path) if step > 1 else [])

    policy = ToyPolicy()
    told = settings(total_steps=4, save_freq=3, resume_freq=1)
    await run(tmp_path, policy, BanditSource(policy, before=look), told)
    assert seen == [[], ["rolling-000001"], ["rolling-000002"], ["checkpoint-000003"]]
    assert names(tmp_path) == ["checkpoint-000003", "checkpoint-000004"]


# ---------------------------------------------------------------- nothing to learn


async def test_a_step_without_anything_to_learn_counts_and_skips_the_optimizer(
    tmp_path: Path,
) -> None:
    policy, log = ToyPolicy(), Log()
    source = ScriptedSource({1: SAME, 2: [], 3: GOOD})
    result = await run(tmp_path, policy, source, settings(), sinks=log, progress=log)
    assert policy.verbs == ["forward_backward", "optim_step", "publish", "save"]
    assert source.published == [1]
    assert result.steps == 3
    assert result.totals.steps_skipped == 2
    assert result.totals.tokens_masked_by_reason == {"context": 4, "no_variance": 4}
    assert log.notes == [
        "Step 1 trained nothing (2 no_variance).",
        "Step 2 trained nothing (no groups came).",
    ]
    assert log.rows[0][1]["groups/skipped_no_variance"] == 2


async def test_dynamic_sampling_refills_what_teaches_nothing(tmp_path: Path) -> None:
    policy = ToyPolicy()
    source = ScriptedSource({1: [*SAME, *GOOD]}, refills=[SAME, [group("e", [1.0, 0.0]), *GOOD]])
    told = settings(total_steps=1, dynamic_sampling=True)
    result = await run(tmp_path, policy, source, told)
    assert source.refill_asked == [(1, 1, 2), (1, 2, 2)]
    [trained] = policy.seen
    assert [s.group_id for s in trained[::2]] == ["a", "b", "e", "a"]
    assert result.totals.tokens_masked_by_reason == {"context": 8, "no_variance": 8, "surplus": 2}


async def test_dynamic_sampling_gives_up(tmp_path: Path) -> None:
    policy = ToyPolicy()
    source = ScriptedSource({1: SAME}, refills=[SAME, SAME, SAME])
    told = settings(total_steps=1, dynamic_sampling=True, max_refill_rounds=3)
    result = await run(tmp_path, policy, source, told)
    assert len(source.refill_asked) == 3
    assert result.totals.steps_skipped == 1


async def test_dynamic_sampling_needs_a_source_that_can(tmp_path: Path) -> None:
    policy = ToyPolicy()
    with pytest.raises(ConfigError, match="BanditSource cannot refill"):
        await run(tmp_path, policy, BanditSource(policy), settings(dynamic_sampling=True))


# ---------------------------------------------------------------- resume


def long_run() -> TrainSettings:
    return settings(
        total_steps=6, save_freq=2, test_freq=3, lr_schedule="linear", mini_batch_num=2, lr=0.1
    )


@pytest.mark.parametrize("killed_at", [1, 3, 4, 6])
async def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path, killed_at: int) -> None:
    straight = ToyPolicy()
    expected = await run(tmp_path / "straight", straight, BanditSource(straight), long_run())

    async def kill(step: int) -> None:
        if step == killed_at:
            raise Killed

    folder, victim = tmp_path / "killed", ToyPolicy()
    with pytest.raises(Killed):
        await run(folder, victim, BanditSource(victim, before=kill), long_run())

    fresh = ToyPolicy(logits=np.full(5, 9.0))  # nothing of the old process is left
    newest = Checkpoints(folder).latest()
    if newest is None:
        fresh = ToyPolicy()
    result = await run(folder, fresh, BanditSource(fresh), long_run(), resume_from=newest)
    assert fresh.logits.tolist() == straight.logits.tolist()
    assert fresh.momentum.tolist() == straight.momentum.tolist()
    assert result.evals == expected.evals
    assert result.steps == 6
    assert result.totals.tokens_trained == expected.totals.tokens_trained
    assert result.totals.tokens_masked_by_reason == expected.totals.tokens_masked_by_reason


async def test_a_validation_that_was_cut_off_is_made_up_for(tmp_path: Path) -> None:
    policy = ToyPolicy()

    async def killed(step: int) -> EvalResult:
        raise Killed

    told = settings(total_steps=2, save_freq=1, test_freq=1)
    with pytest.raises(Killed):
        await run(tmp_path, policy, BanditSource(policy), told, evaluate=killed)
    newest = Checkpoints(tmp_path).latest()
    result = await run(tmp_path, policy, BanditSource(policy), told, resume_from=newest)
    assert sorted(result.evals) == [1, 2]


async def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    policy = ToyPolicy()
    await run(tmp_path, policy, BanditSource(policy), long_run())
    newest = Checkpoints(tmp_path).latest()
    again, source = ToyPolicy(), BanditSource(ToyPolicy())
    result = await run(tmp_path, again, source, long_run(), resume_from=newest)
    assert again.logits.tolist() == policy.logits.tolist()
    assert "optim_step" not in again.verbs
    assert (result.steps, result.checkpoint) == (6, tmp_path / "checkpoint-000006")


@dataclass
class CursorSource(BanditSource):
    """Remembers what it gave; its state goes into checkpoints."""

    given: int = 0
    restored: list[int] = field(default_factory=list)

    async def next_groups(self, step: int) -> list[Any]:
        groups = await super().next_groups(step)
        self.given = step * 10
        return groups

    def state(self) -> dict[str, Any]:
        return {"given": self.given}

    def restore(self, state: Any) -> None:
        self.restored.append(state["given"])


async def test_a_source_with_state_gets_it_back(tmp_path: Path) -> None:
    policy = ToyPolicy()
    await run(tmp_path, policy, CursorSource(policy), settings(total_steps=2))
    newest = Checkpoints(tmp_path).latest()
    source = CursorSource(policy)
    await run(tmp_path, policy, source, settings(total_steps=3), resume_from=newest)
    assert source.restored == [20]


async def test_a_used_folder_needs_a_decision(tmp_path: Path) -> None:
    policy = ToyPolicy()
    await run(tmp_path, policy, BanditSource(policy), settings(total_steps=1))
    with pytest.raises(CheckpointError, match=r"earlier run\. Go on from it with --resume"):
        await run(tmp_path, policy, BanditSource(policy), settings())


async def test_another_seed_is_another_run(tmp_path: Path) -> None:
    policy, log = ToyPolicy(), Log()
    await run(tmp_path, policy, BanditSource(policy), settings(total_steps=1, config_hash="x"))
    newest = Checkpoints(tmp_path).latest()
    with pytest.raises(CheckpointError, match="trained with seed 0, but the config says 5"):
        await run(tmp_path, policy, BanditSource(policy), settings(seed=5), resume_from=newest)
    told = settings(total_steps=2, config_hash="y")
    await run(tmp_path, policy, BanditSource(policy), told, resume_from=newest, progress=log)
    assert log.notes == [
        "The config is not the one checkpoint-000001 was trained with; the run goes on with "
        "the new one."
    ]


# ---------------------------------------------------------------- stop


async def test_stop_abandons_a_rollout_and_saves_the_last_completed_step(tmp_path: Path) -> None:
    stop, cancelled = threading.Event(), []

    async def hang_at_three(step: int) -> None:
        if step == 3:
            stop.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(step)
                raise

    policy = ToyPolicy()
    result = await run(
        tmp_path,
        policy,
        BanditSource(policy, before=hang_at_three),
        settings(total_steps=6),
        stop=stop,
    )
    assert cancelled == [3]
    assert (result.stopped, result.steps) == (True, 2)
    assert names(tmp_path) == ["rolling-000002"]
    assert result.checkpoint == tmp_path / "rolling-000002"
    # and it goes on from there
    newest = Checkpoints(tmp_path).latest()
    again = ToyPolicy()
    result = await run(
        tmp_path, again, BanditSource(again), settings(total_steps=6), resume_from=newest
    )
    straight = ToyPolicy()
    await run(tmp_path / "s", straight, BanditSource(straight), settings(total_steps=6))
    assert again.logits.tolist() == straight.logits.tolist()


async def test_stop_lets_an_update_finish(tmp_path: Path) -> None:
    stop = asyncio.Event()
    policy = ToyPolicy(before_backward=stop.set)
    result = await run(tmp_path, policy, BanditSource(policy), settings(), stop=stop)
    assert (result.stopped, result.steps) == (True, 1)
    assert names(tmp_path) == ["rolling-000001"]


async def test_stop_before_the_first_step_saves_nothing(tmp_path: Path) -> None:
    stop = asyncio.Event()
    stop.set()
    policy = ToyPolicy()
    told = settings(val_before_train=True)
    result = await run(tmp_path, policy, BanditSource(policy), told, stop=stop)
    assert (result.stopped, result.steps, result.checkpoint) == (True, 0, None)
    assert policy.verbs == []


# ---------------------------------------------------------------- trouble


async def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(tmp_path: Path) -> None:
    policy = ToyPolicy()

    def full_at_two(path: Path) -> None:
        if policy.version == 2:
            raise OSError(28, "No space left on device")

    policy.before_save = full_at_two
    with pytest.raises(CheckpointError, match=r"step 2 .* still there: checkpoint-000001"):
        await run(tmp_path, policy, BanditSource(policy), settings(save_freq=1))
    assert names(tmp_path) == ["checkpoint-000001"]
    assert policy.verbs.count("save") == 2  # no second attempt


def failing(after: int, policy: ToyPolicy) -> Callable[[], None]:
    def check() -> None:
        if policy.version >= after:
            raise EngineError("The loss is not finite: nan.")

    return check


async def test_a_failing_update_still_saves_the_last_completed_step(tmp_path: Path) -> None:
    policy = ToyPolicy()
    policy.before_backward = failing(2, policy)
    with pytest.raises(EngineError, match="not finite"):
        await run(tmp_path, policy, BanditSource(policy), settings())
    assert names(tmp_path) == ["rolling-000002"]


async def test_half_a_step_is_not_saved(tmp_path: Path) -> None:
    """The second mini-batch fails after the first has moved the weights."""
    policy = ToyPolicy()

    def check() -> None:
        if policy.version == 1 and policy.verbs[-1] == "optim_step":
            raise EngineError("The loss is not finite: nan.")

    policy.before_backward = check
    source = ScriptedSource({1: GOOD, 2: GOOD})
    with pytest.raises(EngineError):
        await run(tmp_path, policy, source, settings(mini_batch_num=2))
    assert policy.verbs.count("optim_step") == 3
    assert "save" not in policy.verbs


async def test_a_source_that_never_answers_is_named_and_given_up(tmp_path: Path) -> None:
    async def hang(step: int) -> None:
        await asyncio.sleep(60)

    policy, log = ToyPolicy(), Log()
    told = settings(rollout_deadline=1.5, notice_seconds=0.05)
    with pytest.raises(DeadlineExceeded, match="The groups of step 1 did not come within"):
        await run(tmp_path, policy, BanditSource(policy, before=hang), told, progress=log)
    assert log.waits and set(log.waits) == {"The groups of step 1"}


async def test_what_the_source_raises_reaches_the_caller(tmp_path: Path) -> None:
    async def broken(step: int) -> None:
        if step == 2:
            raise EngineError("The engine is gone.")

    policy = ToyPolicy()
    with pytest.raises(EngineError, match="gone"):
        await run(tmp_path, policy, BanditSource(policy, before=broken), settings())
    assert names(tmp_path) == ["rolling-000001"]
