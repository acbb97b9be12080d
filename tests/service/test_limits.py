"""What one tenant may take of memory, in bytes; and an engine that does not answer."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from astuner.errors import CheckpointError, EngineError
from astuner.service.service import Service
from tests.service.unigram import VOCAB
from tests.service.world import MODEL, Client, train_body, world

PROTO = {"Content-Type": "application/x-protobuf"}


# ---------------------------------------------------------------- bytes


async def test_adapters_are_counted_by_what_they_take(tmp_path: Path) -> None:
    """Three of rank 4 fit, or one of rank 12; 20 bytes a number."""
    async with world(tmp_path, max_adapter_bytes=12 * VOCAB * 20) as w:
        a = w.alice
        session = await a.session()
        for number in range(2):
            await a.create(session, number, rank=4)
        wish = {"session_id": session, "model_seq_id": 2, "base_model": MODEL}
        wish["lora_config"] = {"rank": 5}
        detail = await a.refused(400, "POST", "/create_model", json=wish)
        assert "Take a smaller rank" in detail and "GiB" in detail
        await w.bob.create(await w.bob.session(), rank=12)
        await a.create(session, 3, rank=4)
        await a.post(f"/sessions/{session}/finish")
        await a.create(await a.session(), 0, rank=12)


async def test_data_that_waits_is_bounded_for_a_run_and_for_all(tmp_path: Path) -> None:
    """Each request brings 40 tokens of 16 bytes: an id, a target and a weight."""
    limits = {"max_waiting_run_bytes": 1400, "max_waiting_bytes": 2000}
    async with world(tmp_path, **limits) as w:
        a, b = w.alice, w.bob
        mine, theirs = await a.create(await a.session()), await b.create(await b.session())
        ids = [1] * 41

        async def refused(client: Client, run: str, seq: int) -> str:
            body = train_body(run, seq, [ids])
            return await client.refused(
                429, "POST", "/forward_backward", content=body, headers=PROTO
            )

        w.host.gate.clear()
        futures = [await a.train(mine, seq, ids) for seq in (1, 2)]
        assert "try again later" in await refused(a, mine, 3)  # 1920 of 1400
        futures.append(await b.train(theirs, 1, ids))  # 1920 of 2000
        await refused(b, theirs, 2)  # 2560 of 2000
        await a.step(mine, 3)  # brings no data
        w.host.gate.set()
        for future in futures:
            await w.bob.done(future) if theirs in future["request_id"] else await a.done(future)
        await b.done(await b.train(theirs, 2, ids))


async def test_the_request_that_others_wait_for_is_let_in(tmp_path: Path) -> None:
    async with world(tmp_path, max_waiting_run_bytes=1400, max_waiting_bytes=1600) as w:
        a = w.alice
        run = await a.create(await a.session())
        ids = [1] * 41
        futures = [await a.train(run, seq, ids) for seq in (2, 3, 1)]
        for future in futures:
            await a.done(future)


async def test_bodies_being_read_are_bounded_and_one_tenant_has_half(tmp_path: Path) -> None:
    async with world(tmp_path, max_waiting_bytes=4000) as w:
        go_on = asyncio.Event()

        async def slowly():
            yield b"x" * 1900
            await go_on.wait()
            yield b"x"

        headers = {"Content-Type": "application/json"}
        reading = asyncio.create_task(
            w.alice.call("POST", "/telemetry", content=slowly(), headers=headers)
        )
        while not w.intake.held["alice"]:
            await asyncio.sleep(0.01)
        body = {"content": b"x" * 200}
        assert "try again" in await w.alice.refused(429, "POST", "/telemetry", **body)
        assert (await w.bob.call("POST", "/telemetry", **body)).status_code == 200
        go_on.set()
        assert (await reading).status_code == 200
        assert (await w.alice.call("POST", "/telemetry", **body)).status_code == 200
        assert not +w.intake.held


# ---------------------------------------------------------------- an engine without answers


async def test_what_the_engine_does_not_answer_fails_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, operation_timeout=0.05) as w:
        a, b = w.alice, w.bob
        session = await a.session()
        run, sampler = await a.create(session), await a.sampler(session)
        w.host.gate.clear()
        futures = [await a.train(run, 1, [1, 2]), await a.step(run, 2), await a.sample(sampler)]
        await asyncio.sleep(0.1)
        with caplog.at_level(logging.ERROR):
            await w.service.chores.once()
        for future in futures:
            category, error = await a.failure(future)
            assert category == "server" and "has not answered for too long" in error
        assert f"forward_backward of run {run} (tenant alice)" in caplog.text
        assert f"sample request {sampler}:0 (tenant alice)" in caplog.text
        # It answers after all: numbers go on, and what had been given up is not done.
        w.host.gate.set()
        await a.done(await a.train(run, 3, [1, 2]))
        assert w.host.adapters[run].steps == 0
        await b.create(await b.session())


async def test_an_engine_that_is_stuck_fails_everything_and_is_not_healthy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as w:
        a, b = w.alice, w.bob
        runs = [await a.create(await a.session()) for _ in range(6)]
        w.host.gate.clear()
        futures = [await a.train(run, 1, [1, 2]) for run in runs]  # four in hand, two wait
        w.host.doing, w.host.beat_age = "forward_backward", 601.0
        response = await w.http.get("/api/v1/healthz")
        assert response.status_code == 503 and "'forward_backward' for 601 s" in response.text
        with caplog.at_level(logging.ERROR):
            await w.service.chores.once()
        for future in futures:
            assert (await a.failure(future))[0] == "server"
        assert caplog.text.count("The engine does not answer") == 6
        w.host.doing, w.host.beat_age = "idle", 9999.0  # nothing to do is no trouble
        assert (await w.http.get("/api/v1/healthz")).status_code == 200
        w.host.gate.set()
        await b.create(await b.session())


async def test_slots_that_are_all_lost_fail_those_that_wait_for_one(tmp_path: Path) -> None:
    async with world(tmp_path, operation_timeout=0.05) as w:
        a, b = w.alice, w.bob
        runs = [await a.create(await a.session()) for _ in range(4)]
        mine = await b.create(await b.session())
        w.host.gate.clear()
        for run in runs:
            await a.train(run, 1, [1, 2])
        theirs = await b.train(mine, 1, [1, 2])
        await asyncio.sleep(0.1)
        await w.service.chores.once()
        assert (await b.failure(theirs))[0] == "server"
        w.host.gate.set()


async def test_chores_go_on_after_one_of_them_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("astuner.service.sessions.time", clock)
    monkeypatch.setattr("astuner.service.service.CHORE_SECONDS", 0.01)
    async with world(tmp_path, session_timeout=100.0) as w:

        def broken(*_: object) -> None:
            raise ZeroDivisionError("oops")

        def full(*_: object) -> None:
            raise CheckpointError("the disk is full")

        monkeypatch.setattr(w.service.runs, "give_up_gaps", broken)
        monkeypatch.setattr(w.service.futures, "purge", full)
        session = await w.alice.session()
        run = await w.alice.create(session)
        now = 101.0
        await w.until(lambda: run not in w.host.adapters)
        await w.until(lambda: "giving up requests that never came" in caplog.text)
        await w.until(lambda: "forgetting old answers: the disk is full" in caplog.text)
        assert len(w.service.chores._tasks) == len(w.service.chores._chores)  # type: ignore[attr-defined]
        assert not any(t.done() for t in w.service.chores._tasks)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- batches of which a part fails


async def test_no_step_is_taken_on_a_part_of_a_batch(tmp_path: Path) -> None:
    """Three chunks and their step are on their way when the second chunk is refused."""
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        w.host.gate.clear()
        first = await a.train(run, 1, [1, 2])
        second, third = await a.train(run, 2, [1, 99]), await a.train(run, 3, [1, 3])
        step, saved = await a.step(run, 4), await a.save(run, 5, "s")
        w.host.gate.set()
        await a.done(first)
        await a.done(saved)  # before anybody has been told
        assert "token id 99" in (await a.failure(second))[1]
        for future in (third, step):
            category, error = await a.failure(future)
            assert category == "user" and f"request {run}:2 before it failed" in error
        assert w.host.adapters[run].steps == 0 and not w.host.adapters[run].gradient.any()
        # The whole batch again is one step, of that batch alone.
        await a.done(await a.train(run, 6, [1, 2]))
        gradient = w.host.adapters[run].gradient.copy()
        metrics = (await a.done(await a.step(run, 7)))["metrics"]
        assert metrics["grad_norm:mean"] == pytest.approx(float((gradient**2).sum() ** 0.5))
        assert w.host.adapters[run].steps == 1


async def test_a_state_that_is_loaded_ends_the_batch_that_failed(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        state = (await a.done(await a.save(run, 1, "s")))["path"]
        await a.train(run, 2, [1, 99])
        body = {"model_id": run, "seq_id": 3, "path": state, "optimizer": True}
        await a.post("/load_weights", body)
        await a.done(await a.train(run, 4, [1, 2]))  # though nobody has asked what became of 2


async def test_whoever_knows_of_the_failure_goes_on_at_once(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        await a.done(await a.train(run, 1, [1, 2]))
        w.host.fail_next = EngineError("The loss is nan.")
        assert (await a.failure(await a.train(run, 2, [1, 2])))[1] == "The loss is nan."
        assert not w.host.adapters[run].gradient.any()
        await a.done(await a.train(run, 3, [1, 2]))
        await a.done(await a.step(run, 4))
        assert w.host.adapters[run].steps == 1


async def test_a_failed_gradient_is_no_reason_to_call_a_run_interrupted(tmp_path: Path) -> None:
    from astuner.service.store.memory import MemoryStore

    store = MemoryStore()
    async with world(tmp_path, store=store, close=False) as w:
        a = w.alice
        run = await a.create(await a.session())
        await a.done(await a.save(run, 1, "s"))
        await a.done(await a.train(run, 2, [1, 2]))
        w.host.fail_next = EngineError("The gradient is not finite.")
        await a.failure(await a.step(run, 3))
    async with world(tmp_path, store=store) as w:
        await w.alice.done(await w.alice.train(run, 4, [1, 2]))


async def test_a_bug_after_an_operation_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())

        def broken(*_: object) -> None:
            raise ZeroDivisionError("oops")

        monkeypatch.setattr(w.service.observer, "trained", broken)
        category, error = await a.failure(await a.train(run, 1, [1, 2]))
        assert category == "server" and "A bug in the service" in error
        monkeypatch.undo()
        await a.done(await a.train(run, 2, [1, 2]))
        assert w.service.runs.find(run, "alice").next_seq == 3


def test_a_service_is_made_without_a_loop(tmp_path: Path) -> None:
    from astuner.service.base_model import BaseModel
    from astuner.service.store.memory import MemoryStore
    from tests.service.unigram import UnigramHost

    service = Service(BaseModel(MODEL, UnigramHost(), VOCAB), MemoryStore(), tmp_path)
    assert service.stuck() == ""
