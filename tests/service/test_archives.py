"""A checkpoint's archive: asked for with a key, fetched by its URL, gone after a while."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from astuner.service.names import parse_path
from astuner.service.wire import archives
from tests.service.world import Client, World, world


async def saved(w: World) -> str:
    """The archive's path below /api/v1, of weights with PEFT's two files."""
    run = await w.alice.create(await w.alice.session())
    path = (await w.alice.done(await w.alice.save_sampler(run, 1, "final")))["path"]
    checkpoints = w.service.checkpoints
    folder = checkpoints.folder(checkpoints.find(parse_path(path), "alice", reading=True))
    for name in (*archives.FILES, "optimizer.safetensors"):
        (folder / name).write_text(f"content of {name}")
    return f"/training_runs/{run}/checkpoints/sampler_weights/final/archive"


async def fetch(client: Client, url: str) -> dict[str, str]:
    response = await client.http.get(url)  # without a key
    assert response.status_code == 200, response.text
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        return {m.name: (tar.extractfile(m) or io.BytesIO()).read().decode() for m in tar}


async def test_only_what_peft_reads_is_in_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        answer = await w.alice.get(await saved(w))
        assert set(answer) == {"url", "expires"}
        assert await fetch(w.alice, answer["url"]) == {
            "final/adapter_config.json": "content of adapter_config.json",
            "final/adapter_model.safetensors": "content of adapter_model.safetensors",
        }


async def test_others_get_no_url_and_a_wrong_one_leads_nowhere(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        path = await saved(w)
        assert "There is no checkpoint" in await w.bob.refused(404, "GET", path)
        assert "expired" in await w.bob.refused(404, "GET", "/archives/guessed")
        url = (await w.alice.get(path))["url"]
        assert (await w.http.get(f"{url}x")).status_code == 404


async def test_urls_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "SECONDS", -1.0)
    async with world(tmp_path) as w:
        url = (await w.alice.get(await saved(w)))["url"]
        assert (await w.http.get(url)).status_code == 404


async def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after a download, nor when the checkpoint goes in the middle of packing."""
    kept = tmp_path / "tmp"
    kept.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    async with world(tmp_path / "data") as w:
        url = (await w.alice.get(await saved(w)))["url"]
        assert len(await fetch(w.alice, url)) == 2
        for file in (tmp_path / "data").rglob(archives.FILES[1]):
            file.unlink()
        assert (await w.http.get(url)).status_code == 404
        assert list(kept.iterdir()) == []
