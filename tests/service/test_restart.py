"""A server is killed and another one takes over its data: what is still there, and what is
answered how. The first world is left as SIGKILL leaves a process: nothing is tidied up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from astuner.errors import CheckpointError
from astuner.service.store.memory import MemoryStore
from astuner.service.store.protocol import Store
from astuner.service.store.redis import RedisStore
from astuner.service.store.sqlite import SqliteStore
from tests.service.redis_server import redis_server
from tests.service.server import Server, tiny_server
from tests.service.unigram import UnigramHost
from tests.service.world import MODEL, Client, World, logprobs_of, world


class Disk:
    """A data folder and a store that outlive servers."""

    def __init__(self, folder: Path, kind: str, url: str = "") -> None:
        self.folder = folder
        self._kind = kind
        self._url = url
        self._memory = MemoryStore()
        self._open: Store | None = None

    def store(self) -> Store:
        if self._kind == "memory":
            return self._memory
        if self._open is not None:
            self._open.close()  # the operating system does that for a killed process
        if self._kind == "redis":
            self._open = RedisStore(self._url, "astuner")
        else:
            self._open = SqliteStore(self.folder / "records.sqlite")
        return self._open

    @contextlib.asynccontextmanager
    async def server(self, *, killed: bool = True) -> AsyncIterator[World]:
        async with world(
            self.folder, store=self.store(), host=UnigramHost(), close=not killed
        ) as w:
            yield w


@pytest.fixture(params=["sqlite", "redis"])
def disk(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "sqlite":
        yield Disk(tmp_path, "sqlite")
    else:
        with redis_server(tmp_path) as redis:
            yield Disk(tmp_path, "redis", redis.url)


@pytest.fixture
def quick(tmp_path: Path) -> Disk:
    return Disk(tmp_path, "memory")


async def test_everything_answered_is_still_there(disk: Disk) -> None:
    async with disk.server() as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session, rank=3)
        trained = await a.train(run, 1, [1, 2, 3])
        loss = (await a.done(trained)).metrics["loss:sum"]
        await a.done(await a.step(run, 2))
        state = (await a.done(await a.save(run, 3, "s", user_metadata={"step": "1"})))["path"]
        weights = (await a.done(await a.save_sampler(run, 4, "s")))["path"]
        sampler = await a.sampler(session, 0, weights)
        sample = await a.sample(sampler, seed=3)
        tokens = (await a.done(sample)).sequences[0].tokens
        before = w.host.adapters[run]
    async with disk.server(killed=False) as w:
        a = w.alice
        assert (await a.get("/sessions"))["sessions"] == [session]
        assert (await a.get(f"/sessions/{session}"))["training_run_ids"] == [run]
        assert (await a.get(f"/training_runs/{run}"))["lora_rank"] == 3
        listed = (await a.get("/checkpoints"))["checkpoints"]
        assert {c["tinker_path"] for c in listed} == {state, weights}
        assert (await a.done(trained)).metrics["loss:sum"] == pytest.approx(loss)
        assert (await a.done(sample)).sequences[0].tokens == tokens
        # The sampler of a checkpoint draws on, and the run, saved as it was, trains on.
        again = await a.done(await a.sample(sampler, 1, seed=3))
        assert again.sequences[0].tokens == tokens
        await a.post("/session_heartbeat", {"session_id": session})
        await a.done(await a.train(run, 5, [1, 2, 3]))
        np.testing.assert_array_equal(w.host.adapters[run].weights, before.weights)
        np.testing.assert_array_equal(w.host.adapters[run].moment, before.moment)
        # ... and the numbers of its requests go on.
        body = {"model_id": run, "seq_id": 4, "adam_params": {}}
        assert "used already" in await a.refused(400, "POST", "/optim_step", json=body)


async def test_a_resumed_run_goes_on_bitwise(quick: Disk) -> None:
    """Trained four steps in one life, or killed in the middle and resumed from a state."""

    async def steps(w: World, run: str, first: int, number: int) -> None:
        for i in range(number):
            await w.alice.done(await w.alice.train(run, first + 2 * i, [1, 2, 3, 4]))
            await w.alice.done(await w.alice.step(run, first + 2 * i + 1))

    async with quick.server() as w:
        whole = await w.alice.create(await w.alice.session())
        await steps(w, whole, 1, 4)
        expected = w.host.adapters[whole].weights
        run = await w.alice.create(await w.alice.session())
        await steps(w, run, 1, 2)
        state = (await w.alice.done(await w.alice.save(run, 5, "half")))["path"]
        await steps(w, run, 6, 1)  # and these steps are lost
    async with quick.server() as w:
        session = await w.alice.session()
        body = {"session_id": session, "model_seq_id": 0, "path": state, "optimizer": True}
        await w.alice.done(await w.alice.post("/load_weights", body))
        resumed = f"{session}:train:0"
        await steps(w, resumed, 1, 2)
        np.testing.assert_array_equal(w.host.adapters[resumed].weights, expected)


async def test_a_run_that_had_gone_on_says_so_until_a_state_is_loaded(quick: Disk) -> None:
    async with quick.server() as w:
        a = w.alice
        run = await a.create(await a.session())
        state = (await a.done(await a.save(run, 1, "s")))["path"]
        await a.done(await a.train(run, 2, [1, 2]))
    async with quick.server() as w:
        a = w.alice
        category, error = await a.failure(await a.step(run, 3))
        assert category == "user"
        assert "restarted" in error and state in error
        category, error = await a.failure(await a.train(run, 4, [1, 2]))
        assert category == "user" and state in error
        assert run not in w.host.adapters
        body = {"model_id": run, "seq_id": 5, "path": state, "optimizer": True}
        await a.done(await a.post("/load_weights", body))
        await a.done(await a.train(run, 6, [1, 2]))


async def test_a_state_that_does_not_load_leaves_the_run_interrupted(quick: Disk) -> None:
    async with quick.server() as w:
        a = w.alice
        run = await a.create(await a.session())
        state = (await a.done(await a.save(run, 1, "s")))["path"]
        await a.done(await a.train(run, 2, [1, 2]))
    async with quick.server() as w:
        a = w.alice
        body = {"model_id": run, "seq_id": 3, "path": f"{state}-no", "optimizer": True}
        assert "no checkpoint" in (await a.failure(await a.post("/load_weights", body)))[1]
        assert "restarted" in (await a.failure(await a.train(run, 4, [1, 2])))[1]
        assert not w.host.adapters


async def test_an_unsaved_run_without_steps_is_made_again(quick: Disk) -> None:
    async with quick.server() as w:
        run = await w.alice.create(await w.alice.session(), rank=2)
    async with quick.server() as w:
        await w.alice.done(await w.alice.train(run, 1, [1, 2]))
        assert w.host.adapters[run].lora.rank == 2


async def test_unanswered_requests_are_answered_with_what_happened(disk: Disk) -> None:
    async with disk.server() as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session)
        sampler = await a.sampler(session)
        body = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 1}
        ephemeral = await a.done(await a.post("/save_weights_for_sampler", body))
        w.host.gate.clear()
        trained, stepped = await a.train(run, 2, [1, 2]), await a.step(run, 4)  # 3 is missing
        sample = await a.sample(sampler)
        wish = {"session_id": session, "model_seq_id": 1, "base_model": MODEL}
        created = await a.post("/create_model", wish)
    async with disk.server(killed=False) as w:
        a = w.alice
        for future in (trained, stepped):
            category, error = await a.failure(future)
            assert category == "server" and "stopped before" in error and "send it again" in error
        # A sample may simply be drawn again: the SDK does so by itself on 410.
        assert (await a.result(sample["request_id"])).status_code == 410
        await a.done(await a.sample(sampler, 1))
        assert "Create the run again" in (await a.failure(created))[1]
        await a.refused(404, "POST", "/get_info", json={"model_id": f"{session}:train:1"})
        # Weights that were in memory only are gone, and the reply says what to do.
        lost = await a.sample(ephemeral["sampling_session_id"])
        category, error = await a.failure(lost)
        assert category == "user" and "Save them again" in error
        await a.done(await a.train(run, 5, [1, 2]))
        # A third server finds the same answers.
    async with disk.server(killed=False) as w:
        assert "stopped before" in (await w.alice.failure(trained))[1]


async def test_a_checkpoint_whose_folder_is_gone_is_gone(quick: Disk) -> None:
    async with quick.server() as w:
        run = await w.alice.create(await w.alice.session())
        await w.alice.done(await w.alice.save(run, 1, "s"))
    import shutil

    shutil.rmtree(quick.folder / "checkpoints")
    async with quick.server() as w:
        assert (await w.alice.get("/checkpoints"))["checkpoints"] == []


async def test_a_redis_that_hangs_loses_no_answer_and_ends_no_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked meanwhile is asked again by the SDK: 408 and 503, never an error for good."""
    monkeypatch.setattr("astuner.service.store.redis.LOOK_SECONDS", 0.1)
    with redis_server(tmp_path) as redis:
        store = RedisStore(redis.url, "x")
        async with world(tmp_path, store=store, close=False) as w:
            a = w.alice
            session = await a.session()
            run = await a.create(session)
            before = await a.train(run, 1, [1, 2])
            await a.done(before)
            redis.hang()
            body = {"tags": [], "user_metadata": None, "sdk_version": "0"}
            assert "Redis" in await a.refused(503, "POST", "/create_session", json=body)
            assert (await a.call("POST", "/retrieve_future", json=before)).status_code == 408
            meanwhile = await a.train(run, 2, [1, 2])
            await a.done(meanwhile)
            redis.go_on()
            await answering(store)
            for future in (before, meanwhile):
                assert (await a.done(future)).metrics["loss:sum"] == pytest.approx(np.log(16))
            await a.session()
            # What was late is written now, and outlives the server.
            await w.service.chores.once()
        async with world(tmp_path, store=RedisStore(redis.url, "x"), host=w.host) as w:
            assert (await w.alice.done(meanwhile)).metrics["loss:sum"] == pytest.approx(np.log(16))
            assert (await w.alice.get(f"/training_runs/{run}"))["training_run_id"] == run
            body = {"model_id": run, "seq_id": 2, "adam_params": {}}
            assert "used already" in await w.alice.refused(400, "POST", "/optim_step", json=body)


async def answering(store: RedisStore) -> None:
    for _ in range(200):
        with contextlib.suppress(CheckpointError):
            store.read("a", "b")
            return
        await asyncio.sleep(0.05)
    raise AssertionError("Redis is back, and was not found to be")


# ---------------------------------------------------------------- a process


def client_of(server: Server) -> Client:
    http = httpx.AsyncClient(base_url=server.url, timeout=60)
    return Client(http, server.key, model="tiny")


@pytest.mark.timeout(240)
async def test_a_server_on_redis_is_killed_and_another_goes_on(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """A real one, with the embedded engine: training goes on with the very same numbers."""
    ids = [5, 6, 7, 8]
    with redis_server(tmp_path) as redis:
        overrides = ["persistence=redis", f"redis_url={redis.url}"]
        with tiny_server(tiny_model_dir, tmp_path, *overrides) as server:
            a = client_of(server)
            session = await a.session()
            run = await a.create(session)
            await a.done(await a.train(run, 1, ids))
            await a.done(await a.step(run, 2))
            state = (await a.done(await a.save(run, 3, "s")))["path"]
            weights = (await a.done(await a.save_sampler(run, 4, "s")))["path"]
            sampler = await a.sampler(session, 0, weights)
            sample = await a.sample(sampler, seed=3)
            drawn = (await a.done(sample)).sequences[0]
            answered = await a.train(run, 5, ids, forward_only=True)
            expected = logprobs_of(await a.done(answered))[0]
        with tiny_server(tiny_model_dir, tmp_path, *overrides) as server:
            a = client_of(server)
            np.testing.assert_array_equal(logprobs_of(await a.done(answered))[0], expected)
            assert (await a.done(sample)).sequences[0] == drawn
            again = await a.done(await a.sample(sampler, 1, seed=3))
            assert again.sequences[0] == drawn
            after = logprobs_of(await a.done(await a.train(run, 6, ids)))[0]
            np.testing.assert_array_equal(after, expected)
            listed = (await a.get("/checkpoints"))["checkpoints"]
            assert {c["tinker_path"] for c in listed} == {state, weights}
            assert (await a.get("/sessions"))["sessions"] == [session]
