"""Sessions that live, end and are given up, and what they held."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.service.world import world


async def test_the_end_of_a_session_gives_back_adapters_and_snapshots(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        session, other = await a.session(), await a.session()
        run, kept = await a.create(session), await a.create(other)
        body = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 0}
        await a.done(await a.post("/save_weights_for_sampler", body))
        path = (await a.done(await a.save_sampler(run, 2, "s")))["path"]
        samplers = [await a.sampler(session, 1, path), await a.sampler(session, 2, path)]
        theirs = await a.sampler(other, 0, path)
        for sampler in (*samplers, theirs):
            await a.done(await a.sample(sampler))
        assert (len(w.host.adapters), len(w.host.snapshots)) == (2, 2)
        await a.post(f"/sessions/{session}/finish")
        # The checkpoint's weights stay for the other session's sampler.
        assert (list(w.host.adapters), len(w.host.snapshots)) == ([kept], 1)
        await a.done(await a.sample(theirs, 1))
        await a.post(f"/sessions/{other}/finish")
        assert (w.host.adapters, w.host.snapshots) == ({}, {})
        # Records and checkpoints are still there, and the session says that it is over.
        assert len((await a.get("/checkpoints"))["checkpoints"]) == 1
        assert len((await a.get("/training_runs"))["training_runs"]) == 2
        detail = await a.refused(410, "POST", "/session_heartbeat", json={"session_id": session})
        assert "its client finished it" in detail
        request = {"model_id": run, "seq_id": 3, "adam_params": {}}
        await a.refused(410, "POST", "/optim_step", json=request)


async def test_a_client_that_vanishes_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("astuner.service.sessions.time", clock)
    async with world(tmp_path, session_timeout=100.0) as w:
        a = w.alice
        vanished, alive = await a.session(), await a.session()
        run, kept = await a.create(vanished), await a.create(alive)
        w.host.gate.clear()
        running = await a.train(run, 1, [1, 2])
        waiting = await a.train(run, 2, [1, 2])
        now = 60.0
        await a.post("/session_heartbeat", {"session_id": alive})
        now = 120.0
        await a.post("/session_heartbeat", {"session_id": alive})
        await w.service.chores.once()
        w.host.gate.set()
        for future in (running, waiting):
            category, error = await a.failure(future)
            assert category == "user" and "ended" in error
        assert list(w.host.adapters) == [kept]
        await a.done(await a.train(kept, 1, [1, 2]))


async def test_a_client_that_leaves_in_the_middle_of_a_sample(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        session = await a.session()
        sampler = await a.sampler(session)
        w.host.gate.clear()
        future = await a.sample(sampler, n=3)
        await w.until(lambda: w.host.running == 3)
        await a.post("/cancel_future", {"request_id": future["request_id"]})
        await w.until(lambda: w.host.running == 0)
        assert "cancelled" in (await a.failure(future))[1]
        await a.post("/cancel_future", {"request_id": future["request_id"]})
        w.host.gate.set()
        await a.done(await a.sample(sampler, 1))


async def test_snapshots_beyond_the_limit_wait_on_disk_and_come_back(tmp_path: Path) -> None:
    async with world(tmp_path, max_snapshots=2) as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session)
        samplers, expected = [], []
        for i in range(5):
            body = {"model_id": run, "seq_id": 3 * i + 1, "sampling_session_seq_id": i}
            reply = await a.done(await a.post("/save_weights_for_sampler", body))
            samplers.append(reply["sampling_session_id"])
            expected.append(w.host.adapters[run].weights.copy())
            await a.done(await a.train(run, 3 * i + 2, [1, i + 2]))
            await a.done(await a.step(run, 3 * i + 3))
            assert len(w.host.snapshots) <= 2
        for seq, i in enumerate((0, 1, 3, 2, 0)):
            drawn = await a.done(await a.sample(samplers[i], seq, seed=1))
            assert drawn.sequences
            assert len(w.host.snapshots) <= 2
            newest = max(w.host.snapshots, key=lambda name: int(name.split("-")[1]))
            assert (w.host.snapshots[newest] == expected[i]).all()
        await a.post(f"/sessions/{session}/finish")
        assert w.host.snapshots == {}
        assert not list((tmp_path / "spilled").iterdir())
