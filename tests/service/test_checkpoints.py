"""Checkpoints on a real disk: a save is there or not, whenever the server is killed, and
whoever holds the weights of an earlier save has those and no others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from astuner.errors import CheckpointError
from astuner.service.store.memory import MemoryStore
from astuner.service.store.protocol import Row
from tests.service.saving_process import FILES, PATH, book_in, save
from tests.service.unigram import UnigramHost
from tests.service.world import Client, World, world

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------- SIGKILL


def found(folder: Path) -> set[str]:
    """What the files of the checkpoint say, and that there is no other folder."""
    book = book_in(folder)
    record = book.find(PATH, "alice", reading=True)
    book._store.close()  # pyright: ignore[reportPrivateUsage]
    kept = book.folder(record)
    assert list(kept.parent.iterdir()) == [kept]
    return {(kept / name).read_text() for name in FILES}


@pytest.mark.timeout(120)
def test_sigkill_at_any_moment_leaves_a_whole_save(tmp_path: Path) -> None:
    """The last one that was answered, or the one that was being made."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for life in range(4):
        command = [sys.executable, "-m", "tests.service.saving_process", str(tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3 + life)]
        time.sleep(0.0007 * life)
        process.kill()
        said += process.stdout.readlines()
        process.wait(10)
        last = int([line for line in said if line.endswith(b"\n")][-1])
        (number,) = found(tmp_path)
        assert int(number) in (last, last + 1)


class Killed(BaseException):
    """Nothing runs after it."""


@pytest.mark.parametrize("moment", ["before the row", "after the row"])
async def test_a_save_is_the_writing_of_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    book = book_in(tmp_path)
    await save(book, 1)
    store, real = book._store, book._store.write  # pyright: ignore[reportPrivateUsage]

    def write(rows: list[Row]) -> None:
        if moment == "after the row":
            real(rows)
        raise Killed

    def rmtree(*_: object, **__: object) -> None:
        """A killed process removes nothing."""

    monkeypatch.setattr(store, "write", write)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(Killed):
        await save(book, 2)
    monkeypatch.undo()
    store.close()
    assert len(list((tmp_path / "checkpoints").glob("*/*/*"))) == 2
    assert found(tmp_path) == ({"2"} if moment == "after the row" else {"1"})


async def test_records_that_are_lost_take_no_weights_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book = book_in(tmp_path)
    await save(book, 1)
    book._store.close()  # pyright: ignore[reportPrivateUsage]
    for file in tmp_path.glob("records.sqlite*"):
        file.unlink()
    book_in(tmp_path)._store.close()  # pyright: ignore[reportPrivateUsage]
    (folder,) = (tmp_path / "checkpoints").glob("*/*/*")
    assert (folder / "a").read_text() == "1"
    assert "1 folders of checkpoints" in caplog.text


class Unsure(MemoryStore):
    """Takes a row and then says that it failed, as Redis may when its answer is lost."""

    unsure = False

    def write(self, rows: object) -> None:
        super().write(rows)  # type: ignore[arg-type]
        if self.unsure:
            raise CheckpointError("no answer")


async def test_a_store_that_is_unsure_loses_neither_save(tmp_path: Path) -> None:
    store = Unsure()
    async with world(tmp_path, store=store, close=False) as w:
        a = w.alice
        run = await a.create(await a.session())
        await a.done(await a.save(run, 1, "s"))
        store.unsure = True
        category, error = await a.failure(await a.save(run, 2, "s", overwrite=True))
        assert (category, error) == ("server", "no answer")
        folders = list((tmp_path / "checkpoints").glob("*/*/*"))
        assert len(folders) == 2  # whichever the row names is there
        store.unsure = False
        await w.service.chores.once()
        (left,) = (tmp_path / "checkpoints").glob("*/*/*")
    async with world(tmp_path, store=store) as w:
        (record,) = w.service.checkpoints.of_tenant("alice")
        assert w.service.checkpoints.folder(record) == left


# ---------------------------------------------------------------- who has read it


async def taught(client: Client, run: str, seq: int, letter: int) -> None:
    await client.done(await client.train(run, seq, [1, *[letter] * 4]))
    await client.done(await client.step(run, seq + 1, lr=3.0))


async def greedy(client: Client, sampler: str, seq: int) -> int:
    drawn = await client.done(await client.sample(sampler, seq, max_tokens=1, temperature=0))
    return int(np.frombuffer(drawn.sequences[0].tokens, "<i4")[0])


@pytest.mark.parametrize("how", ["saved again", "deleted"])
async def test_a_sampler_keeps_the_weights_it_was_made_of(tmp_path: Path, how: str) -> None:
    """Also when they leave the engine meanwhile; after a restart it says that they are gone."""
    store = MemoryStore()
    async with world(tmp_path, store=store, close=False, max_snapshots=1) as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session)
        await taught(a, run, 1, 3)
        path = (await a.done(await a.save_sampler(run, 3, "x")))["path"]
        sampler = await a.sampler(session, 0, path)
        # The SDK has no overwrite for these, so the name is free only after a delete.
        await a.call("DELETE", f"/training_runs/{run}/checkpoints/sampler_weights/x")
        if how == "saved again":
            await taught(a, run, 4, 5)
            await a.done(await a.save_sampler(run, 6, "x"))
            assert await greedy(a, await a.sampler(session, 1, path), 0) == 5
        assert await greedy(a, sampler, 1) == 3
        used = w.service.shelf.spilled_bytes("alice")
        assert used > 0 and w.service.shelf.spilled_bytes("bob") == 0
        await a.post(f"/sessions/{await a.session()}/finish")  # another one's end changes nothing
        assert await greedy(a, sampler, 2) == 3
    async with world(tmp_path, store=store) as w:
        a = w.alice
        category, error = await a.failure(await a.sample(sampler, 7))
        assert category == "user" and f"{path} was deleted, or saved again" in error
        assert len(list((tmp_path / "checkpoints").glob("*/*/*"))) == (how == "saved again")


async def test_the_folder_goes_with_the_last_sampler(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session)
        path = (await a.done(await a.save_sampler(run, 1, "x")))["path"]
        await a.sampler(session, 0, path)
        await a.call("DELETE", f"/training_runs/{run}/checkpoints/sampler_weights/x")
        assert len(list((tmp_path / "checkpoints").glob("*/*/*"))) == 1
        await a.post(f"/sessions/{session}/finish")
        assert list((tmp_path / "checkpoints").glob("*/*/*")) == []
        assert w.service.shelf.spilled_bytes("alice") == 0


async def test_a_run_made_from_a_state_that_was_saved_again_says_so(tmp_path: Path) -> None:
    """Bob's run is at Alice's state; she saves another one under that name; the server dies."""
    store = MemoryStore()
    async with world(tmp_path, store=store, close=False) as w:
        a, b = w.alice, w.bob
        run = await a.create(await a.session())
        path = (await a.done(await a.save(run, 1, "s")))["path"]
        await a.call("POST", f"/training_runs/{run}/checkpoints/weights/s/publish")
        session = await b.session()
        body = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": True}
        await b.done(await b.post("/load_weights", body))
        await taught(a, run, 2, 5)
        await a.done(await a.save(run, 4, "s", overwrite=True))
        await a.call("POST", f"/training_runs/{run}/checkpoints/weights/s/publish")
    async with world(tmp_path, store=store, host=UnigramHost()) as w:
        mine = f"{session}:train:0"
        category, error = await w.bob.failure(await w.bob.train(mine, 1, [1, 2]))
        assert category == "user" and f"{path}, which run {mine} was at, has been saved" in error
        body = {"model_id": mine, "seq_id": 2, "path": path, "optimizer": True}
        await w.bob.done(await w.bob.post("/load_weights", body))
        await w.bob.done(await w.bob.train(mine, 3, [1, 2]))


# ---------------------------------------------------------------- weights without a checkpoint


async def published(w: World, run: str, seq: int, number: int, **more: str) -> str:
    body = {"model_id": run, "seq_id": seq, "sampling_session_seq_id": number, **more}
    made = await w.alice.done(await w.alice.post("/save_weights_for_sampler", body))
    return made["sampling_session_id"]


async def test_a_run_keeps_its_last_weights_and_says_that_others_are_closed(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, max_run_samplers=3, max_snapshots=2) as w:
        a = w.alice
        session = await a.session()
        run, other = await a.create(session), await a.create(session, 1)
        kept = await published(w, other, 1, 100)
        samplers = []
        for step in range(20):
            await a.done(await a.train(run, 3 * step + 1, [1, 2]))
            await a.done(await a.step(run, 3 * step + 2))
            samplers.append(await published(w, run, 3 * step + 3, step))
            await a.done(await a.sample(samplers[0], step))  # used all the while
        living = [s.sampler_id for s in w.service.samplers.of_session(session)]
        assert sorted(living) == sorted([kept, samplers[0], *samplers[-2:]])
        assert w.service.shelf.resident <= 2 and len(w.host.snapshots) <= 2
        assert len(list((tmp_path / "spilled").iterdir())) <= 2
        for sampler in samplers[1:18]:
            body = {"sampling_session_id": sampler, "prompt": {"chunks": []}, "seq_id": 99}
            body |= {"sampling_params": {}, "num_samples": 1}
            body["prompt"] = {"chunks": [{"type": "encoded_text", "tokens": [1]}]}
            detail = await a.refused(410, "POST", "/asample", json=body)
            assert "a run keeps 3 sets of weights" in detail
            await w.bob.refused(404, "POST", "/asample", json=body)
        await a.done(await a.sample(kept))
        await a.post(f"/sessions/{session}/finish")
        assert (w.host.snapshots, list((tmp_path / "spilled").iterdir())) == ({}, [])


async def test_a_sampler_that_is_drawing_is_not_closed(tmp_path: Path) -> None:
    async with world(tmp_path, max_run_samplers=1, max_running_samples=1) as w:
        a = w.alice
        run = await a.create(await a.session())
        first = await published(w, run, 1, 0)
        w.host.gate.clear()
        futures = [await a.sample(first, seq) for seq in range(3)]  # one runs, two wait
        await a.train(run, 2, [1, 2])
        await a.step(run, 3)
        body = {"model_id": run, "seq_id": 4, "sampling_session_seq_id": 1}
        made = await a.post("/save_weights_for_sampler", body)
        w.host.gate.set()
        for future in [made, *futures]:
            await a.done(future)
        await w.service.chores.once()
        detail = await a.refused(410, "POST", "/asample", json=sample_of(first))
        assert "was closed" in detail


def sample_of(sampler: str) -> dict[str, object]:
    from tests.service.world import sample_body

    return sample_body(sampler, 50)


async def test_inflight_samplers_share_one_set_of_weights(tmp_path: Path) -> None:
    async with world(tmp_path, max_run_samplers=1) as w:
        run = await w.alice.create(await w.alice.session())
        samplers = [await published(w, run, i + 1, i, kind="inflight") for i in range(5)]
        await w.service.chores.once()
        assert len(w.host.snapshots) == 1
        for sampler in samplers:
            await w.alice.done(await w.alice.sample(sampler))


async def test_weights_on_disk_for_samplers_only_are_the_tenants_too(tmp_path: Path) -> None:
    async with world(tmp_path, max_checkpoint_bytes=500, max_snapshots=1) as w:
        a = w.alice
        run = await a.create(await a.session())
        for number in range(3):  # one stays in memory, two take about 330 bytes each on disk
            await a.done(await a.train(run, 3 * number + 1, [1, 2]))
            await a.done(await a.step(run, 3 * number + 2))
            await published(w, run, 3 * number + 3, number)
        body = {"model_id": run, "seq_id": 10, "sampling_session_seq_id": 3}
        category, error = await a.failure(await a.post("/save_weights_for_sampler", body))
        assert category == "user" and "kept for samplers only" in error
        assert "500" in (await a.failure(await a.save(run, 11, "s")))[1]


async def test_the_number_of_a_sampler_is_not_used_twice(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        run = await w.alice.create(await w.alice.session())
        first = await published(w, run, 1, 0)
        body = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 0}
        again = await w.alice.done(await w.alice.post("/save_weights_for_sampler", body))
        assert again["sampling_session_id"] == first  # the same request
        body["seq_id"] = 2
        category, error = await w.alice.failure(
            await w.alice.post("/save_weights_for_sampler", body)
        )
        assert category == "user" and "exists already" in error
        assert len(w.host.snapshots) == 1
