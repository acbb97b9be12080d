"""The REST client's questions, with literal answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.service.world import MODEL, world


async def test_runs_sessions_and_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        sessions = [await a.session(), await a.session()]
        runs = [await a.create(s, i, rank=2 + i) for s in sessions for i in range(2)]
        await a.done(await a.save(runs[3], 1, "one", user_metadata={"step": "1"}))
        await a.done(await a.save_sampler(runs[3], 2, "two"))
        listed = await a.get("/training_runs?limit=3&offset=1")
        assert [r["training_run_id"] for r in listed["training_runs"]] == runs[2::-1]
        assert listed["cursor"] == {"offset": 1, "limit": 3, "total_count": 4}
        run = await a.get(f"/training_runs/{runs[3]}?access_scope=owned")
        assert (run["base_model"], run["lora_rank"], run["model_owner"]) == (MODEL, 3, "alice")
        assert run["last_checkpoint"]["checkpoint_id"] == "weights/one"
        assert run["last_checkpoint"]["user_metadata"] == {"step": "1"}
        assert run["last_sampler_checkpoint"]["checkpoint_type"] == "sampler"
        found = (await a.get(f"/training_runs/{runs[3]}/checkpoints"))["checkpoints"]
        assert [c["checkpoint_id"] for c in found] == ["weights/one", "sampler_weights/two"]
        assert all(c["size_bytes"] > 0 and c["public"] is False for c in found)
        mine = await a.get("/checkpoints")
        assert [c["checkpoint_id"] for c in mine["checkpoints"]] == [
            "sampler_weights/two",
            "weights/one",
        ]
        assert (await a.get("/sessions"))["sessions"] == sessions[::-1]
        session = await a.get(f"/sessions/{sessions[0]}")
        assert session["training_run_ids"] == runs[:2]
        assert session["user_metadata"] == {"who": "me"}
        for query in ("limit=-1", "limit=x", "offset=-1", "limit=100000"):
            await a.refused(400, "GET", f"/training_runs?{query}")


async def test_checkpoints_expire_are_kept_and_deleted(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        base = f"/training_runs/{run}/checkpoints/weights"
        await a.done(await a.save(run, 1, "short", ttl_seconds=1))
        await a.done(await a.save(run, 2, "kept", ttl_seconds=3600))
        await a.done(await a.save(run, 3, "gone"))
        assert (
            await a.call("PUT", f"{base}/kept/ttl", json={"ttl_seconds": None})
        ).status_code == 200
        assert (await a.call("DELETE", f"{base}/gone")).status_code == 200
        await a.refused(404, "DELETE", f"{base}/gone")
        await asyncio.sleep(1.1)
        # Out of sight at once, and off the disk at the next tidying.
        listed = (await a.get("/checkpoints"))["checkpoints"]
        assert [(c["checkpoint_id"], c["expires_at"]) for c in listed] == [("weights/kept", None)]
        await a.refused(
            404, "POST", "/weights_info", json={"tinker_path": f"tinker://{run}/weights/short"}
        )
        assert len(list((tmp_path / "checkpoints").glob("*/weights/*"))) == 2
        await w.service.chores.once()
        names = [p.name for p in (tmp_path / "checkpoints").glob("*/weights/*")]
        assert [name.partition("@")[0] for name in names] == ["kept"]
        await a.done(await a.save(run, 4, "short"))  # the name is free again
        for seq, ttl in enumerate((0, -5, 10**12), start=5):
            await a.refused(400, "PUT", f"{base}/kept/ttl", json={"ttl_seconds": ttl})
            category, error = await a.failure(await a.save(run, seq, "x", ttl_seconds=ttl))
            assert category == "user" and "ttl_seconds must be from 1" in error


async def test_a_name_is_taken_until_it_is_overwritten(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        await a.done(await a.save(run, 1, "s"))
        await a.done(await a.save_sampler(run, 2, "s"))  # a kind of its own
        for seq, save in ((3, a.save), (4, a.save_sampler)):
            category, error = await a.failure(await save(run, seq, "s"))
            assert category == "user" and "already" in error
        await a.done(await a.train(run, 5, [1, 2]))
        await a.done(await a.step(run, 6))
        await a.done(await a.save(run, 7, "s", overwrite=True))
        body = {
            "model_id": run,
            "seq_id": 8,
            "path": f"tinker://{run}/weights/s",
            "optimizer": True,
        }
        await a.done(await a.post("/load_weights", body))
        assert w.host.adapters[run].weights[2] > 0


async def test_what_does_not_fit_is_not_loaded(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        session = await a.session()
        small, large = await a.create(session, 0, rank=2), await a.create(session, 1, rank=4)
        state = (await a.done(await a.save(small, 1, "s")))["path"]
        weights = (await a.done(await a.save_sampler(large, 1, "s")))["path"]
        for seq, path, message in (
            (2, state, "another kind"),
            (3, weights, "without the optimizer"),
        ):
            body = {"model_id": large, "seq_id": seq, "path": path, "optimizer": True}
            category, error = await a.failure(await a.post("/load_weights", body))
            assert category == "user" and message in error
        body = {"model_id": large, "seq_id": 4, "path": weights, "optimizer": False}
        await a.done(await a.post("/load_weights", body))
        new = {"session_id": session, "model_seq_id": 2, "path": state, "optimizer": False}
        await a.done(await a.post("/load_weights", new))
        info = await a.post("/get_info", {"model_id": f"{session}:train:2"})
        assert info["lora_rank"] == 2
        await a.refused(400, "POST", "/load_weights", json={"path": state, "optimizer": True})
