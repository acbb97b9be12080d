"""Checkpoints that are too many go from the service, and only those."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from astuner.backbone.trinity.surplus import Surplus
from astuner.config.schema import TrainerConfig


@contextmanager
def service(status: int) -> Generator[tuple[str, list[str]]]:
    """That answers every DELETE so; its URL, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_DELETE(self) -> None:
            asked.append(f"{self.headers['X-API-Key']} {self.path}")
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def saved(run_dir: Path, *steps: int) -> Path:
    folder = run_dir / "checkpoints" / "trinity"
    for step in steps:
        own = folder / f"global_step_{step}"
        own.mkdir(parents=True)
        (own / "remote_checkpoint_path.txt").write_text(f"tinker://ab:train:0/weights/state-{step}")
    (folder / "global_step_5").mkdir()  # weights of a sampler only
    (folder / "latest_checkpointed_iteration.txt").write_text(str(max(steps)))
    return folder


def trainer(**given: int) -> TrainerConfig:
    return TrainerConfig(**{"save_freq": 4, "keep_checkpoints": 1, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("status", [204, 404])
async def test_lasting_ones_and_the_newest_stay(tmp_path: Path, status: int) -> None:
    folder = saved(tmp_path, 2, 4, 6, 8, 10)
    with service(status) as (url, asked):
        surplus = Surplus(tmp_path, trainer(), 100, (url, "tml-k"))
        surplus.delete(10)
        surplus.delete(10)  # once a step
        await asyncio.wait_for(surplus.settle(), 60)
        surplus.delete(10)
        await asyncio.wait_for(surplus.settle(), 60)
    path = "tml-k /api/v1/training_runs/ab:train:0/checkpoints/weights/state"
    assert asked == [f"{path}-2", f"{path}-4", f"{path}-6"]
    left = sorted(p.parent.name for p in folder.rglob("remote_checkpoint_path.txt"))
    assert left == ["global_step_10", "global_step_8"]


async def test_weights_that_nobody_samples_with_any_more_go(tmp_path: Path) -> None:
    folder = saved(tmp_path, 12)
    for step in range(1, 13):
        own = folder / f"global_step_{step}"
        own.mkdir(exist_ok=True)
        path = f"tinker://ab:train:0/sampler_weights/sampler-{step}"
        (own / "remote_sampler_path.txt").write_text(path)
    with service(204) as (url, asked):
        surplus = Surplus(tmp_path, trainer(), 100, (url, "k"))
        surplus.delete(11)
        await asyncio.wait_for(surplus.settle(), 60)
        surplus.delete(12)
        await asyncio.wait_for(surplus.settle(), 60)
    path = "k /api/v1/training_runs/ab:train:0/checkpoints/sampler_weights/sampler"
    assert asked == [f"{path}-1", f"{path}-2", f"{path}-3", f"{path}-4"]
    assert len(list(folder.rglob("remote_sampler_path.txt"))) == 8


async def test_what_cannot_be_deleted_costs_room_not_the_run(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2, 4)
    with service(500) as (url, asked):
        surplus = Surplus(tmp_path, trainer(), 100, (url, "k"))
        surplus.delete(4)
        await asyncio.wait_for(surplus.settle(), 60)
    assert len(asked) == 1
    assert (folder / "global_step_2" / "remote_checkpoint_path.txt").exists()


async def test_a_service_that_hangs_does_not_stop_the_loop(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2, 4)
    hanging = await asyncio.start_server(lambda *_: asyncio.sleep(60), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{hanging.sockets[0].getsockname()[1]}"
    surplus = Surplus(tmp_path, trainer(), 100, (url, "k"))
    surplus.delete(4)
    surplus.delete(5)  # while the first is at work
    settling = asyncio.create_task(surplus.settle())
    await asyncio.sleep(0.05)
    assert not settling.done()
    settling.cancel()
    assert (folder / "global_step_2" / "remote_checkpoint_path.txt").exists()
    hanging.close()


async def test_without_a_service_nothing_is_deleted(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2, 4)
    surplus = Surplus(tmp_path, trainer(), 100, None)
    surplus.delete(4)
    await surplus.settle()
    assert (folder / "global_step_2" / "remote_checkpoint_path.txt").exists()
