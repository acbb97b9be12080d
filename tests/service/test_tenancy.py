"""What one tenant cannot see, touch or use up of another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from astuner.errors import ConfigError, RequestError
from astuner.service.tenants import Tenants, key_in, new_key
from tests.service.world import MODEL, Client, World, sample_body, train_body, world


async def test_a_key_is_needed_and_must_be_known(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        for key in ("", "tml-nobody-at-all", "tml-alice-key-1 ", "tml-alice-key-"):
            stranger = Client(w.http, key)
            detail = await stranger.refused(401, "GET", "/get_server_capabilities")
            assert "API key" in detail and "tml-alice-key-1" not in detail
        response = await w.http.get("/api/v1/healthz")
        assert response.json() == {"status": "ok"}


async def foreign_requests(w: World) -> list[tuple[str, str, dict[str, Any]]]:
    """Everything that can be asked about what is Alice's: (method, path, arguments)."""
    a = w.alice
    session = await a.session()
    run = await a.create(session)
    state = (await a.done(await a.save(run, 1, "s")))["path"]
    weights = (await a.done(await a.save_sampler(run, 2, "s")))["path"]
    sampler = await a.sampler(session, 0, weights)
    pending = (await a.train(run, 3, [1, 2]))["request_id"]
    bobs = await w.bob.session()
    body = train_body(run, 4, [[1, 2]])
    base = f"/training_runs/{run}"
    sampling = {"session_id": session, "sampling_session_seq_id": 5}
    creation = {"session_id": session, "model_seq_id": 5}
    return [
        ("POST", "/session_heartbeat", {"json": {"session_id": session}}),
        ("POST", f"/sessions/{session}/finish", {"json": {}}),
        ("GET", f"/sessions/{session}", {}),
        ("POST", "/get_info", {"json": {"model_id": run}}),
        ("POST", "/forward_backward", {"content": body}),
        ("POST", "/optim_step", {"json": {"model_id": run, "seq_id": 4, "adam_params": {}}}),
        ("POST", "/save_weights", {"json": {"model_id": run, "seq_id": 4, "path": "x"}}),
        (
            "POST",
            "/save_weights_for_sampler",
            {"json": {"model_id": run, "seq_id": 4, "path": "x"}},
        ),
        (
            "POST",
            "/load_weights",
            {"json": {"model_id": run, "seq_id": 4, "path": state, "optimizer": True}},
        ),
        (
            "POST",
            "/load_weights",
            {"json": {"session_id": bobs, "model_seq_id": 0, "path": state, "optimizer": True}},
        ),
        ("POST", "/create_model", {"json": {**creation, "base_model": MODEL}}),
        ("POST", "/create_sampling_session", {"json": {**sampling, "base_model": MODEL}}),
        (
            "POST",
            "/create_sampling_session",
            {"json": {**sampling, "session_id": bobs, "model_path": weights}},
        ),
        ("GET", f"/samplers/{sampler}", {}),
        ("POST", "/asample", {"json": sample_body(sampler, 9)}),
        ("POST", "/retrieve_future", {"json": {"request_id": pending}}),
        ("POST", "/cancel_future", {"json": {"request_id": pending}}),
        ("GET", base, {}),
        ("GET", f"{base}/checkpoints", {}),
        ("POST", "/weights_info", {"json": {"tinker_path": state}}),
        ("DELETE", f"{base}/checkpoints/weights/s", {}),
        ("POST", f"{base}/checkpoints/weights/s/publish", {}),
        ("DELETE", f"{base}/checkpoints/weights/s/publish", {}),
        ("PUT", f"{base}/checkpoints/weights/s/ttl", {"json": {"ttl_seconds": 1}}),
    ]


async def test_what_is_another_tenants_does_not_exist(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        requests = await foreign_requests(w)
        checkpoints = w.service.checkpoints.of_tenant("alice")
        runs = w.service.runs.of_tenant("alice")
        for method, path, arguments in requests:
            detail = await w.bob.refused(404, method, path, **arguments)
            assert detail.startswith("There is no "), (path, detail)
        for path in ("/training_runs", "/checkpoints", "/sessions"):
            listed = await w.bob.get(path)
            assert not listed.get("training_runs") and not listed.get("checkpoints")
        # Alice's things are as they were, and go on working.
        assert w.service.checkpoints.of_tenant("alice") == checkpoints
        assert [r.run_id for r in w.service.runs.of_tenant("alice")] == [r.run_id for r in runs]
        (run,) = runs
        output = await w.alice.done({"request_id": f"{run.run_id}:3"})
        assert output.metrics["loss:sum"] == pytest.approx(np.log(16))
        await w.alice.done(await w.alice.step(run.run_id, 4))


async def test_published_weights_can_be_used_but_not_changed(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a, b = w.alice, w.bob
        run = await a.create(await a.session())
        await a.done(await a.train(run, 1, [1, 2, 3]))
        await a.done(await a.step(run, 2))
        state = (await a.done(await a.save(run, 3, "s")))["path"]
        base = f"/training_runs/{run}/checkpoints/weights/s"
        assert (await a.call("POST", f"{base}/publish")).status_code == 200
        info = await b.post("/weights_info", {"tinker_path": state})
        assert (info["base_model"], info["lora_rank"]) == (MODEL, 4)
        session = await b.session()
        body = {"session_id": session, "model_seq_id": 0, "path": state, "optimizer": True}
        await b.done(await b.post("/load_weights", body))
        mine = f"{session}:train:0"
        np.testing.assert_array_equal(w.host.adapters[mine].weights, w.host.adapters[run].weights)
        await b.done(await b.train(mine, 1, [4, 5]))
        await b.done(await b.step(mine, 2))
        assert not np.array_equal(w.host.adapters[mine].weights, w.host.adapters[run].weights)
        await b.refused(404, "DELETE", base)
        assert (await a.call("DELETE", f"{base}/publish")).status_code == 200
        await b.refused(404, "POST", "/weights_info", json={"tinker_path": state})


async def test_two_tenants_with_the_same_names_do_not_meet(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        paths = []
        for client, target in ((w.alice, 3), (w.bob, 5)):
            run = await client.create(await client.session())
            await client.done(await client.train(run, 1, [1, target]))
            await client.done(await client.step(run, 2))
            paths.append((await client.done(await client.save_sampler(run, 3, "same")))["path"])
        assert paths[0] != paths[1]
        prompts = []
        for client, path in zip((w.alice, w.bob), paths, strict=True):
            sampler = await client.sampler(await client.session(), 0, path)
            drawn = await client.done(
                await client.sample(sampler, prompt=[1, 3, 5], prompt_logprobs=True)
            )
            prompts.append(np.frombuffer(drawn.prompt_logprobs, "<f4"))
        assert prompts[0][1] > prompts[0][2]
        assert prompts[1][2] > prompts[1][1]
        assert {tenant for _, tenant in w.host.streams} == {"alice", "bob"}


async def test_a_long_queue_of_one_tenant_does_not_hold_up_another(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a, b = w.alice, w.bob
        runs = [await a.create(s, i) for s in [await a.session()] for i in range(8)]
        mine = await b.create(await b.session())
        w.host.gate.clear()
        futures = [await a.train(run, seq, [1, 2]) for run in runs for seq in (1, 2, 3, 4)]
        theirs = await b.train(mine, 1, [3, 4])
        w.host.log.clear()
        w.host.gate.set()
        await b.done(theirs)
        # Before it only what was in hand already, and one turn of the other tenant.
        place = [run for verb, run in w.host.log if verb == "forward_backward"].index(mine)
        assert place <= 5
        for future in futures:
            await a.done(future)


async def test_quotas(tmp_path: Path) -> None:
    async with world(tmp_path, max_sessions=2, max_runs=2, max_rank=8) as w:
        a = w.alice
        session = await a.session()
        await a.session()
        body = {"tags": [], "user_metadata": None, "sdk_version": "0"}
        assert "2 sessions" in await a.refused(400, "POST", "/create_session", json=body)
        await w.bob.session()
        for number in range(2):
            await a.create(session, number)
        wish = {"session_id": session, "model_seq_id": 2, "base_model": MODEL}
        wish["lora_config"] = {"rank": 8}
        assert "2 training runs" in await a.refused(400, "POST", "/create_model", json=wish)
        for rank in (0, 9):
            asked = {**wish, "model_seq_id": 3, "lora_config": {"rank": rank}}
            detail = await a.refused(400, "POST", "/create_model", json=asked)
            assert "rank must be from 1 to 8" in detail


async def test_checkpoints_have_a_quota_of_their_own(tmp_path: Path) -> None:
    async with world(tmp_path, max_checkpoint_bytes=700) as w:
        a = w.alice
        run = await a.create(await a.session())
        await a.done(await a.save(run, 1, "one"))
        await a.done(await a.save(run, 2, "two"))
        category, error = await a.failure(await a.save(run, 3, "three"))
        assert category == "user" and "700" in error
        await a.call("DELETE", f"/training_runs/{run}/checkpoints/weights/one")
        await a.call("DELETE", f"/training_runs/{run}/checkpoints/weights/two")
        await a.done(await a.save(run, 4, "three"))


def test_keys_are_compared_whole() -> None:
    tenants = Tenants({"a": "tml-aaaaaaaaaa", "b": "tml-bbbbbbbbbb"})
    assert (tenants.find("tml-aaaaaaaaaa"), tenants.find("tml-bbbbbbbbbb")) == ("a", "b")
    for wrong in (None, "", "tml-aaaaaaaaa", "tml-aaaaaaaaaaa", "tml-äaaaaaaaaa"):
        with pytest.raises(RequestError):
            tenants.find(wrong)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"a": "sk-1234567890"}, "must start with 'tml-'"),
        ({"a": "tml-1"}, "at least 12"),
        ({"a b": "tml-1234567890"}, "cannot name a tenant"),
        ({"a": "tml-1234567890", "b": "tml-1234567890"}, "the same key"),
    ],
)
def test_keys_that_cannot_be_are_refused(keys: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tenants(keys)


def test_the_key_that_is_made_is_kept_and_is_nobody_elses_to_read(tmp_path: Path) -> None:
    key, file, is_new = key_in(tmp_path / "data")
    assert is_new and key.startswith("tml-") and file.stat().st_mode & 0o777 == 0o600
    assert key_in(tmp_path / "data") == (key, file, False)
    assert new_key() != new_key()
