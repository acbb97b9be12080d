"""Bad input and trouble: what each comes to, and that no other tenant notices.

Errors of users are 4xx, or futures that failed with the category "user": never a 5xx,
which the SDK would send again for minutes.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tinker.proto import tinker_public_pb2 as pb

from astuner.errors import CheckpointError, EngineClosed, EngineError
from astuner.service.store.memory import MemoryStore
from astuner.service.store.protocol import Row
from tests.service.world import MODEL, Client, World, sample_body, tensor, train_body, world

PROTO = {"Content-Type": "application/x-protobuf"}


async def bob_is_fine(w: World) -> None:
    """Trains, saves and samples as if nothing had happened."""
    b = w.bob
    session = await b.session()
    run = await b.create(session)
    output = await b.done(await b.train(run, 1, [1, 2, 3]))
    assert output.metrics["loss:sum"] == pytest.approx(2 * np.log(16))
    await b.done(await b.step(run, 2))
    path = (await b.done(await b.save_sampler(run, 3, "s")))["path"]
    await b.done(await b.sample(await b.sampler(session, 0, path)))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["weights", "logprobs", "advantages"])
async def test_numbers_that_are_none_are_named(tmp_path: Path, name: str, value: float) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        inputs: dict[str, Any] = {"logprobs": [0.0, 0.0], "advantages": [0.0, 1.0]}
        inputs |= {name: [0.0, value]}
        future = await a.train(run, 1, [1, 2, 3], loss="importance_sampling", **inputs)
        category, error = await a.failure(future)
        assert category == "user" and f"Datum 0: {name}[1] is" in error
        await a.done(await a.train(run, 2, [1, 2]))  # the number 1 is used up, no more
        await bob_is_fine(w)


async def test_a_loss_or_gradient_that_overflows_fails_that_request_only(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        future = await a.train(run, 1, [1, 2, 3], weights=[3e38, 3e38])
        category, error = await a.failure(future)
        assert category == "user" and "The loss is" in error
        w.host.fail_next = EngineError("The gradient is not finite.")
        category, error = await a.failure(await a.step(run, 2))
        assert (category, error) == ("user", "The gradient is not finite.")
        await a.done(await a.train(run, 3, [1, 2]))
        await bob_is_fine(w)


async def test_a_bug_of_ours_is_the_servers_fault_and_one_requests(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        w.host.fail_next = ZeroDivisionError("oops")
        category, error = await a.failure(await a.train(run, 1, [1, 2]))
        assert category == "server" and "ZeroDivisionError: oops" in error
        w.host.fail_next = EngineClosed("The engine was stopped.")
        assert (await a.failure(await a.step(run, 2)))[0] == "server"
        await a.done(await a.train(run, 3, [1, 2]))
        await bob_is_fine(w)


@pytest.mark.parametrize(
    "params",
    [
        {"learning_rate": float("nan")},
        {"learning_rate": -1.0},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": -1.0},
        {"weight_decay": float("inf")},
    ],
)
async def test_optimizers_that_cannot_be(tmp_path: Path, params: dict[str, float]) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        import json

        body = {"model_id": run, "seq_id": 1, "adam_params": params}
        response = await a.call("POST", "/optim_step", content=json.dumps(body))
        assert response.status_code in (400, 422), response.text
        assert next(iter(params)) in response.json()["detail"]


async def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session)
        params = {"type": "dimuon", "learning_rate": 1.0}
        body = {"model_id": run, "seq_id": 1, "optimizer_params": params}
        assert "dimuon" in await a.refused(422, "POST", "/optim_step", json=body)
        wish = {"session_id": session, "model_seq_id": 1, "base_model": MODEL}
        wish["optimizer_config"] = {"type": "dimuon", "version": 1}
        assert "dimuon" in await a.refused(400, "POST", "/create_model", json=wish)


# ---------------------------------------------------------------- bodies


async def test_a_body_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path, max_request_bytes=2000) as w:
        a = w.alice
        run = await a.create(await a.session())
        body = train_body(run, 1, [[1] * 600])
        detail = await a.refused(413, "POST", "/forward_backward", content=body, headers=PROTO)
        assert "2000 bytes" in detail
        await bob_is_fine(w)


def broken_bodies() -> dict[str, bytes]:
    run = "x"
    good = train_body(run, 1, [[1, 2, 3]])
    datum = pb.Datum()
    datum.model_input.add().encoded_text.tokens = b"\1\0\0"
    image = pb.Datum()
    image.model_input.add().image.data = b"png"
    empty = pb.Datum()
    empty.model_input.add()
    shape = pb.Datum()
    shape.loss_fn_inputs["weights"].CopyFrom(tensor([1.0, 2.0]))
    shape.loss_fn_inputs["weights"].shape[0] = 3
    negative = pb.Datum()
    negative.loss_fn_inputs["weights"].CopyFrom(tensor([1.0]))
    negative.loss_fn_inputs["weights"].shape[:] = [-1, -1]
    dtype = pb.Datum()
    dtype.loss_fn_inputs["weights"].dense = b""
    sparse = pb.Datum()
    csr = sparse.loss_fn_inputs["weights"]
    csr.dtype = pb.DTYPE_FLOAT32
    csr.shape.extend([2, 2])
    csr.sparse_csr.values = np.float32([1]).tobytes()
    csr.sparse_csr.crow_indices = np.int64([0, 1, 1]).tobytes()
    csr.sparse_csr.col_indices = np.int64([7]).tobytes()
    huge = pb.Datum()
    huge.CopyFrom(sparse)
    huge.loss_fn_inputs["weights"].shape[:] = [10**9, 10**9]
    data = {
        "half a token": datum,
        "an image": image,
        "an empty chunk": empty,
        "a shape that does not fit": shape,
        "a negative shape": negative,
        "no type": dtype,
        "sparse indices beyond the shape": sparse,
        "a sparse tensor that would fill the memory": huge,
    }
    bodies = {
        name: pb.ForwardBackwardRequest(model_id=run, seq_id=1, data=[d]).SerializeToString()
        for name, d in data.items()
    }
    return {"cut off": good[:-3], "noise": b"\xff" * 50, "JSON": b'{"model_id": 1}', **bodies}


@pytest.mark.parametrize("name", broken_bodies())
async def test_malformed_protobuf_is_a_400_that_says_what_is_wrong(
    tmp_path: Path, name: str
) -> None:
    async with world(tmp_path) as w:
        body = broken_bodies()[name]
        detail = await w.alice.refused(
            400, "POST", "/forward_backward", content=body, headers=PROTO
        )
        assert detail.startswith("The request body is malformed: ")


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/create_session", "[]", ""),
        ("/create_session", "{", ""),
        ("/create_model", '{"session_id": 5}', "session_id"),
        ("/optim_step", '{"model_id": "x", "seq_id": "y", "adam_params": {}}', "seq_id"),
        ("/optim_step", '{"model_id": "x", "seq_id": 1}', "optim_params"),
        ("/asample", '{"sampling_session_id": "x", "prompt": {}}', "prompt.chunks"),
        ("/retrieve_future", "{}", "request_id"),
    ],
)
async def test_json_that_does_not_fit_names_the_field(
    tmp_path: Path, path: str, body: str, names: str
) -> None:
    async with world(tmp_path) as w:
        assert names in await w.alice.refused(422, "POST", path, content=body)


async def test_fields_of_a_newer_sdk_are_no_reason_to_refuse(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        body = {
            "tags": [],
            "user_metadata": None,
            "sdk_version": "9.9",
            "from_the_future": {"x": 1},
        }
        session = (await a.post("/create_session", body))["session_id"]
        wish = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": MODEL,
            "lora_config": {"rank": 2, "flavour": "new"},
            "and": "more",
        }
        run = (await a.done(await a.post("/create_model", wish)))["model_id"]
        step = {
            "model_id": run,
            "seq_id": 1,
            "adam_params": {"learning_rate": 0.1, "new": 1},
            "new": 2,
        }
        await a.done(await a.post("/optim_step", step))
        sampler = await a.sampler(session)
        sample = sample_body(sampler, 0)
        sample["new"] = sample["prompt"]["new"] = sample["sampling_params"]["new"] = 1
        await a.done(await a.post("/asample", sample))


async def test_data_that_cannot_be_trained_on(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"loss": "hinge"}, "'hinge' is not offered here. Choose one of: cross_entropy"),
        ({"loss": "stable_reinforce"}, "is not offered here"),
        ({"loss": "ppo"}, "Datum 0 lacks logprobs and advantages"),
        ({"weights": [1.0]}, "weights of shape [1]"),
        ({"config": {"clip": 1.0}}, "has no parameter 'clip'"),
        ({"surprise": [1.0, 1.0]}, "has surprise, which the loss 'cross_entropy' does not read"),
    ]
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        for seq, (arguments, message) in enumerate(cases, start=1):
            category, error = await a.failure(await a.train(run, seq, [1, 2, 3], **arguments))
            assert category == "user" and message in error, error
        seq = len(cases) + 1
        for ids, message in (
            ([1, 99], "the token id 99; the model's ids are 0 to 15"),
            ([-1, 1], "the token id -1"),
            ([1] * 66, "65 tokens; the model's context is 64"),
            ([1], "at least one"),
        ):
            category, error = await a.failure(await a.train(run, seq, ids))
            assert category == "user" and message in error, error
            seq += 1
        assert "no data" in (await a.failure(await a.train(run, seq)))[1]
        await a.done(await a.train(run, seq + 1, [1, 2]))


async def test_samples_that_cannot_be_drawn(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt": []}, "at least one"),
        ({"prompt": [16]}, "0 to 15"),
        ({"prompt": [1] * 64}, "context is 64"),
        ({"n": 0}, "num_samples"),
        ({"n": 10**6}, "num_samples"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"topk_prompt_logprobs": 1000}, "topk_prompt_logprobs"),
        ({"prompt_alt_tokens_k": 2}, "not offered"),
        ({"stop": ["a"]}, "need a tokenizer"),
        ({"stop": [1.5]}, ""),
    ]
    async with world(tmp_path) as w:
        sampler = await w.alice.sampler(await w.alice.session())
        for arguments, message in cases:
            response = await w.alice.call(
                "POST", "/asample", json=sample_body(sampler, **arguments)
            )
            assert response.status_code in (400, 422), (arguments, response.text)
            assert message in response.json()["detail"]
        image = sample_body(sampler)
        image["prompt"]["chunks"] = [{"type": "image", "data": "", "format": "png"}]
        assert "reads text only" in await w.alice.refused(400, "POST", "/asample", json=image)
        await w.alice.done(await w.alice.sample(sampler))


async def test_models_that_are_not_served(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        session = await a.session()
        wish = {"session_id": session, "model_seq_id": 0, "base_model": "gpt-9"}
        assert "'unigram' is" in await a.refused(400, "POST", "/create_model", json=wish)
        asked = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "gpt-9"}
        detail = await a.refused(400, "POST", "/create_sampling_session", json=asked)
        assert "not served" in detail
        await a.refused(404, "GET", "/nothing/here")
        await a.refused(405, "GET", "/create_session")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    ["../../../etc/cron.d/x", "..", "a/b", "/etc/passwd", "%2e%2e", "a\u0000b", "", "x" * 300],
)
async def test_names_that_climb_out_of_the_folder(tmp_path: Path, name: str) -> None:
    async with world(tmp_path / "data") as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session)
        for seq, save in ((1, a.save), (2, a.save_sampler)):
            category, error = await a.failure(await save(run, seq, name))
            assert category == "user" and "cannot name a checkpoint" in error
        for path in (f"tinker://{run}/weights/{name}", f"tinker://../{name}/weights/x", name):
            await a.refused(400, "POST", "/weights_info", json={"tinker_path": path})
            body = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
            await a.refused(400, "POST", "/create_sampling_session", json=body)
            body = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": True}
            await a.refused(400, "POST", "/load_weights", json=body)
        found = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")}
        assert found <= {"data"}
        await a.done(await a.save(run, 3, "fine"))


async def test_deleting_takes_no_path_either(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    async with world(tmp_path / "data") as w:
        run = await w.alice.create(await w.alice.session())
        for tail in ("weights/..%2f..%2f..%2f..%2fprecious", "..%2f..%2f/precious", "weights/.."):
            response = await w.alice.call("DELETE", f"/training_runs/{run}/checkpoints/{tail}")
            assert response.status_code in (400, 404, 405)
    assert precious.is_dir()


# ---------------------------------------------------------------- numbers of requests


async def test_chunks_that_arrive_last_first_are_done_in_order(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        second = await a.train(run, 2, [1, 2], forward_only=True)
        third = await a.step(run, 3)
        await asyncio.sleep(0.02)
        assert [verb for verb, _ in w.host.log] == ["create"]
        first = await a.train(run, 1, [1, 2])
        for future in (third, second, first):
            await a.done(future)
        verbs = [verb for verb, _ in w.host.log]
        assert verbs == ["create", "forward_backward", "forward", "optim_step"]


async def test_a_request_sent_twice_is_done_once(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session)
        first, again = await a.train(run, 1, [1, 2]), await a.train(run, 1, [1, 2])
        assert first == again
        await a.done(first)
        assert await a.train(run, 1, [1, 2]) == first  # also when it is answered
        assert [verb for verb, _ in w.host.log].count("forward_backward") == 1
        response = await a.call(
            "POST", "/forward_backward", content=train_body(run, 1, [[1, 3]]), headers=PROTO
        )
        assert response.status_code == 400 and "another" in response.json()["detail"]
        sampler = await a.sampler(session)
        assert sampler == await a.sampler(session)
        assert await a.sample(sampler, 0, seed=1) == await a.sample(sampler, 0, seed=1)
        wish = {"session_id": session, "model_seq_id": 1, "base_model": MODEL}
        made = [await a.post("/create_model", wish) for _ in range(2)]
        assert made[0] == made[1]
        await a.done(made[0])
        assert len(w.host.adapters) == 2


async def test_a_future_can_be_fetched_again(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        future = await a.train(run, 1, [1, 2])
        first, again = await a.result(future["request_id"]), await a.result(future["request_id"])
        assert first.status_code == 200 and first.content == again.content
        failed = await a.train(run, 2, [1, 99])
        assert await a.failure(failed) == await a.failure(failed)
        assert "no request" in await a.refused(
            404, "POST", "/retrieve_future", json={"request_id": "nobody:1"}
        )


async def test_an_answer_too_old_is_given_up(tmp_path: Path) -> None:
    store = MemoryStore()
    async with world(tmp_path, store=store, result_ttl=0.0) as w:
        a = w.alice
        run = await a.create(await a.session())
        future = await a.train(run, 1, [1, 2])
        await a.done(future)
        await w.service.chores.once()
        await a.refused(404, "POST", "/retrieve_future", json=future)
        assert list(store.scan("results")) == [] and list(store.scan("futures")) == []
        detail = await a.refused(
            400, "POST", "/optim_step", json={"model_id": run, "seq_id": 1, "adam_params": {}}
        )
        assert "used already" in detail


async def test_what_is_not_done_yet_says_so(tmp_path: Path) -> None:
    async with world(tmp_path, poll_seconds=0.01) as w:
        a = w.alice
        run = await a.create(await a.session())
        w.host.gate.clear()
        future = await a.train(run, 1, [1, 2])
        response = await a.call("POST", "/retrieve_future", json=future)
        assert response.status_code == 408
        assert response.json()["type"] == "try_again"
        w.host.gate.set()
        await a.done(future)


async def test_a_number_that_never_comes_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    async with world(tmp_path, gap_timeout=0.0) as w:
        a = w.alice
        run = await a.create(await a.session())
        step = await a.step(run, 2)
        await asyncio.sleep(0.01)
        await w.service.chores.once()
        category, error = await a.failure(step)
        assert category == "user" and "Request 1 of this run did not arrive" in error
        assert w.host.adapters[run].steps == 0
        await a.done(await a.train(run, 3, [1, 2]))


async def test_too_much_at_once_is_told_to_come_again(tmp_path: Path) -> None:
    limits = {"max_waiting_samples": 4, "max_running_samples": 1, "max_waiting_operations": 2}
    async with world(tmp_path, **limits) as w:
        a = w.alice
        session = await a.session()
        run, sampler = await a.create(session), await a.sampler(session)
        w.host.gate.clear()
        futures = [await a.sample(sampler, seq, n=2) for seq in range(2)]
        assert "try again" in await a.refused(
            429, "POST", "/asample", json=sample_body(sampler, 5, n=2)
        )
        futures += [await a.train(run, seq, [1, 2]) for seq in (1, 2, 3)]
        body = train_body(run, 4, [[1, 2]])
        await a.refused(429, "POST", "/forward_backward", content=body, headers=PROTO)
        w.host.gate.set()
        for future in futures:
            await a.done(future)
        await a.done(await a.train(run, 4, [1, 2]))


async def test_a_server_whose_engine_has_ended_is_not_healthy(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        assert (await w.http.get("/api/v1/healthz")).status_code == 200
        w.host.doing = "closed"
        response = await w.http.get("/api/v1/healthz")
        assert response.status_code == 503
        assert response.json() == {"status": "the engine has ended"}


# ---------------------------------------------------------------- the disk


class FullStore(MemoryStore):
    full = False

    def write(self, rows: Any) -> None:
        if self.full and any(row.value is not None for row in rows):
            raise CheckpointError("The records cannot be written: the disk is full.")
        super().write(rows)


async def test_a_full_disk_fails_what_must_be_kept_and_nothing_else(tmp_path: Path) -> None:
    store = FullStore()
    async with world(tmp_path, store=store) as w:
        a = w.alice
        session = await a.session()
        run, sampler = await a.create(session), await a.sampler(session)
        store.full = True
        body = {"tags": [], "user_metadata": None, "sdk_version": "0"}
        detail = await a.refused(503, "POST", "/create_session", json=body)
        assert "the disk is full" in detail
        # Training and sampling go on; their answers are kept in memory.
        trained = await a.train(run, 1, [1, 2])
        assert (await a.done(trained)).metrics["loss:sum"] == pytest.approx(np.log(16))
        await a.done(await a.sample(sampler))
        await a.done(trained)
        category, error = await a.failure(await a.save(run, 2, "s"))
        assert category == "server" and "disk is full" in error
        store.full = False
        await a.done(await a.save(run, 3, "s"))
        await bob_is_fine(w)


async def test_what_was_answered_while_the_disk_was_full_is_written_later(tmp_path: Path) -> None:
    store = FullStore()
    async with world(tmp_path, store=store, close=False) as w:
        run = await w.alice.create(await w.alice.session())
        store.full = True
        trained, stepped = await w.alice.train(run, 1, [1, 2]), await w.alice.step(run, 2)
        await w.alice.done(stepped)
        await w.service.chores.once()  # it is still full
        assert [key for key, _ in store.scan("results")] == [f"{run}:0"]
        store.full = False
        await w.service.chores.once()
    async with world(tmp_path, store=store) as w:
        loss = (await w.alice.done(trained)).metrics["loss:sum"]
        assert loss == pytest.approx(np.log(16))
        # The new server knows of the step that went with the old one.
        category, error = await w.alice.failure(await w.alice.train(run, 3, [1, 2]))
        assert category == "user" and "restarted" in error


async def test_a_run_that_was_not_made_does_not_come_back_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its failure could not be written, with the run's record; its deletion could."""
    store = FullStore()
    async with world(tmp_path, store=store) as w:
        session = await w.alice.session()

        async def create(*_: object, **__: object) -> None:
            store.full = True
            raise EngineError("no room")

        monkeypatch.setattr(w.host, "create", create)
        wish = {"session_id": session, "model_seq_id": 0, "base_model": MODEL}
        made = await w.alice.post("/create_model", wish)
        assert await w.alice.failure(made) == ("user", "no room")
        assert list(store.scan("runs")) == []
        assert b'"pending"' in (store.read("futures", made["request_id"]) or b"")
        store.full = False
        await w.service.chores.once()
        assert list(store.scan("runs")) == []
        assert b'"failed"' in (store.read("futures", made["request_id"]) or b"")


async def test_a_run_that_was_not_made_is_forgotten_once_the_store_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    async with world(tmp_path, store=store) as w:
        session = await w.alice.session()

        def away(_: Sequence[Row]) -> None:
            raise CheckpointError("The store is away.")

        async def create(*_: object, **__: object) -> None:
            monkeypatch.setattr(store, "write", away)
            raise EngineError("no room")

        monkeypatch.setattr(w.host, "create", create)
        wish = {"session_id": session, "model_seq_id": 0, "base_model": MODEL}
        await w.alice.failure(await w.alice.post("/create_model", wish))
        assert len(list(store.scan("runs"))) == 1
        monkeypatch.undo()
        await w.service.chores.once()
        assert list(store.scan("runs")) == []


async def test_a_run_that_cannot_be_recorded_is_answered_so(tmp_path: Path) -> None:
    store = FullStore()
    async with world(tmp_path, store=store, poll_seconds=0.01) as w:
        a = w.alice
        session = await a.session()
        wish = {"session_id": session, "model_seq_id": 0, "base_model": MODEL}
        store.full = True
        made = [await a.post("/create_model", wish) for _ in range(2)]
        assert made[0] == made[1]
        category, error = await a.failure(made[0])
        assert category == "server" and "disk is full" in error
        assert w.host.adapters == {} and list(store.scan("runs")) == []
        store.full = False
        await a.done(await a.post("/create_model", wish | {"model_seq_id": 1}))
        assert len(w.host.adapters) == 1
        await bob_is_fine(w)


async def test_a_sampler_that_cannot_be_recorded_leaves_no_weights(tmp_path: Path) -> None:
    store = FullStore()
    async with world(tmp_path, store=store) as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session)
        path = (await a.done(await a.save_sampler(run, 1, "s")))["path"]
        store.full = True
        asked = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
        await a.refused(503, "POST", "/create_sampling_session", json=asked)
        body = {"model_id": run, "seq_id": 2, "sampling_session_seq_id": 1}
        category, error = await a.failure(await a.post("/save_weights_for_sampler", body))
        assert category == "server" and "disk is full" in error
        assert w.host.snapshots == {}
        # The end of a session gives everything back all the same.
        await a.post(f"/sessions/{session}/finish")
        assert w.host.adapters == {}
        store.full = False
        await bob_is_fine(w)


async def test_a_checkpoint_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        run = await a.create(await a.session())
        await a.done(await a.save(run, 1, "good"))
        old = w.host.adapters[run].weights.copy()
        await a.done(await a.train(run, 2, [1, 2]))
        await a.done(await a.step(run, 3))
        for seq, error in ((4, CheckpointError("disk full")), (5, OSError(28, "No space left"))):
            w.host.fail_next = error
            category, message = await a.failure(await a.save(run, seq, "good", overwrite=True))
            assert category == "server" and ("disk full" in message or "No space" in message)
        assert len((await a.get("/checkpoints"))["checkpoints"]) == 1
        assert not list((tmp_path / "checkpoints" / ".tmp").glob("*"))
        path = f"tinker://{run}/weights/good"
        body = {"model_id": run, "seq_id": 6, "path": path, "optimizer": True}
        await a.done(await a.post("/load_weights", body))
        np.testing.assert_array_equal(w.host.adapters[run].weights, old)


def test_sqlite_tells_of_a_full_disk(tmp_path: Path) -> None:
    from astuner.service.store.sqlite import SqliteStore

    store = SqliteStore(tmp_path / "r.sqlite")
    store.write([Row("a", "x", b"1")])
    store._db.execute("PRAGMA max_page_count = 3")  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(CheckpointError, match="full"):
        store.write([Row("a", "y", b"0" * 100_000), Row("a", "x", b"2")])
    assert store.read("a", "x") == b"1"  # wholly or not at all
    store.close()
    assert sqlite3.connect(tmp_path / "r.sqlite").execute("PRAGMA integrity_check").fetchone()


# ---------------------------------------------------------------- many at once


async def test_two_hundred_clients_at_once(tmp_path: Path) -> None:
    async def one(client: Client, i: int) -> float:
        session = await client.session()
        run = await client.create(session)
        await client.done(await client.train(run, 1, [1, 2 + i % 10]))
        await client.done(await client.step(run, 2))
        sampler = await client.sampler(session)
        await client.done(await client.sample(sampler, n=2))
        output = await client.done(await client.train(run, 3, [1, 2 + i % 10], forward_only=True))
        await client.post(f"/sessions/{session}/finish")
        return output.metrics["loss:sum"]

    async with world(tmp_path, max_runs=200, max_sessions=200, poll_seconds=5.0) as w:
        clients = [w.alice if i % 2 else w.bob for i in range(200)]
        losses = await asyncio.wait_for(
            asyncio.gather(*(one(c, i) for i, c in enumerate(clients))), 60
        )
        # Each trained its own weights, once.
        assert losses == pytest.approx([losses[0]] * 200)
        assert losses[0] < np.log(16)
        assert (w.host.adapters, w.host.snapshots) == ({}, {})
        assert w.host.peak <= 128


async def test_a_bug_answers_with_a_500_and_an_id_and_the_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as w:

        def broken(*_: object) -> None:
            raise ZeroDivisionError("oops")

        monkeypatch.setattr(w.service.sessions, "of_tenant", broken)
        response = await w.alice.call("GET", "/sessions")
        assert response.status_code == 500
        assert "ZeroDivisionError" in response.json()["detail"]
        assert len(response.headers["x-request-id"]) == 32
        monkeypatch.undo()
        await bob_is_fine(w)


async def test_encoded_bodies_are_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        headers = {**PROTO, "Content-Encoding": "zstd"}
        await w.alice.refused(415, "POST", "/forward_backward", content=b"x", headers=headers)


async def test_a_client_that_leaves_while_it_sends(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        app = w.http._transport.app  # type: ignore[attr-defined]
        request = httpx.Request("POST", "http://service/api/v1/create_session")
        messages = [{"type": "http.request", "body": b"{", "more_body": True}]
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": request.url.path,
            "raw_path": request.url.raw_path,
            "query_string": b"",
            "headers": [(b"x-api-key", b"tml-alice-key-1")],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("service", 80),
            "client": ("x", 1),
            "root_path": "",
        }
        await app(scope, receive, send)
        assert sent[0]["status"] == 400
        await bob_is_fine(w)
