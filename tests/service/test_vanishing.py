"""Clients that leave while the embedded engine is at their verb, which then cannot be stopped:
what it makes is given back all the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from astuner.algorithm.registry import find_kl, find_loss
from astuner.engine.embedded.host import EmbeddedHost
from tests.service.world import MODEL, World, sample_body, world


@pytest.fixture(scope="module")
def host(tiny_model_dir: Path) -> Generator[EmbeddedHost]:
    host = EmbeddedHost.open(
        tiny_model_dir, device="cpu", dtype="float32", losses=find_loss, kls=find_kl
    )
    yield host
    host.close()


class Held:
    """A method of the engine's bank that waits, once it runs, until it is let go."""

    def __init__(self, host: EmbeddedHost, patch: pytest.MonkeyPatch, name: str) -> None:
        self.running, self.go = threading.Event(), threading.Event()
        bank: Any = host._bank  # pyright: ignore[reportPrivateUsage]
        method: Callable[..., Any] = getattr(bank, name)

        def held(*args: Any, **more: Any) -> Any:
            self.running.set()
            assert self.go.wait(30)
            return method(*args, **more)

        patch.setattr(bank, name, held)

    async def is_running(self) -> None:
        assert await asyncio.to_thread(self.running.wait, 30)


async def nothing_left(w: World) -> None:
    for _ in range(500):
        stats = w.service.base.host.stats()
        if (stats.adapters, stats.snapshots, stats.queued) == (0, 0, 0):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{stats.adapters} adapters and {stats.snapshots} snapshots are left")


async def finished(w: World, session: str, held: Held) -> None:
    """The session ends while the verb runs; then the verb does."""
    ending = asyncio.create_task(w.alice.post(f"/sessions/{session}/finish"))
    await w.until(lambda: w.service.sessions.find(session, "alice").ended)
    await asyncio.sleep(0.05)
    held.go.set()
    await asyncio.wait_for(ending, 30)
    await nothing_left(w)


async def test_while_an_adapter_is_made(
    tmp_path: Path, host: EmbeddedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, host=host) as w:
        held = Held(host, monkeypatch, "create")
        session = await w.alice.session()
        wish = {"session_id": session, "model_seq_id": 0, "base_model": MODEL}
        made = await w.alice.post("/create_model", wish)
        await held.is_running()
        await finished(w, session, held)
        assert (await w.alice.failure(made))[0] == "user"


async def test_while_an_adapter_is_brought_back_from_a_state(
    tmp_path: Path, host: EmbeddedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, host=host) as w:
        session = await w.alice.session()
        run = await w.alice.create(session)
        path = (await w.alice.done(await w.alice.save(run, 1, "s")))["path"]
        held = Held(host, monkeypatch, "restore")
        body = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": True}
        await w.alice.post("/load_weights", body)
        await held.is_running()
        await finished(w, session, held)


@pytest.mark.parametrize("body", [{"sampling_session_seq_id": 0}, {"path": "s"}])
async def test_while_a_snapshot_is_taken(
    tmp_path: Path, host: EmbeddedHost, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    async with world(tmp_path, host=host) as w:
        session = await w.alice.session()
        run = await w.alice.create(session)
        held = Held(host, monkeypatch, "snapshot")
        await w.alice.post("/save_weights_for_sampler", {"model_id": run, "seq_id": 1, **body})
        await held.is_running()
        await finished(w, session, held)
        assert list((tmp_path / "checkpoints").glob("*/*/*")) == []


async def test_while_a_checkpoint_is_written(
    tmp_path: Path, host: EmbeddedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, host=host) as w:
        session = await w.alice.session()
        run = await w.alice.create(session)
        held = Held(host, monkeypatch, "export")
        await w.alice.save(run, 1, "s")
        await held.is_running()
        await finished(w, session, held)
        for _ in range(500):
            if not list((tmp_path / "checkpoints").glob("*/*/*")):
                break
            await asyncio.sleep(0.01)
        assert list((tmp_path / "checkpoints").glob("*/*/*")) == []
        assert (await w.alice.get("/checkpoints"))["checkpoints"] == []


async def test_while_weights_are_read_for_a_sample(
    tmp_path: Path, host: EmbeddedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, host=host) as w:
        session = await w.alice.session()
        run = await w.alice.create(session)
        path = (await w.alice.done(await w.alice.save_sampler(run, 1, "s")))["path"]
        sampler = await w.alice.sampler(session, 0, path)
        held = Held(host, monkeypatch, "open_snapshot")
        sample = await w.alice.post("/asample", sample_body(sampler))
        await held.is_running()
        await w.alice.post("/cancel_future", {"request_id": sample["request_id"]})
        await finished(w, session, held)
