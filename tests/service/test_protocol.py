"""The quick start of the protocol, request by request, against numbers computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.service.world import MODEL, logprobs_of, world

LOG16 = float(np.log(16))


async def test_quick_start(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        assert (await a.post("/client/config", {"sdk_version": "0.38.0"}))[
            "pjwt_auth_enabled"
        ] is False
        models = (await a.get("/get_server_capabilities"))["supported_models"]
        assert models == [
            {"model_name": MODEL, "max_context_length": 64, "trainable": True, "sampleable": True}
        ]
        session = await a.session()
        run = await a.create(session)
        assert run == f"{session}:train:0"
        info = await a.post("/get_info", {"model_id": run})
        assert (info["lora_rank"], info["model_data"]["model_name"]) == (4, MODEL)

        output = await a.done(await a.train(run, 1, [1, 2, 3], [4, 5]))
        assert output.metrics["loss:sum"] == pytest.approx(3 * LOG16)
        assert [list(x) for x in logprobs_of(output)] == [
            pytest.approx([-LOG16, -LOG16]),
            pytest.approx([-LOG16]),
        ]
        metrics = (await a.done(await a.step(run, 2)))["metrics"]
        # Three targets: 3 chances of 1/16 at each id, less 1 for the ids 2, 3 and 5.
        norm = float(np.sqrt(13 * (3 / 16) ** 2 + 3 * (1 - 3 / 16) ** 2))
        assert metrics["grad_norm:mean"] == pytest.approx(norm, rel=1e-5)

        after = await a.done(await a.train(run, 3, [1, 2, 3], forward_only=True))
        assert after.metrics["loss:sum"] < 2 * LOG16
        state = await a.done(await a.save(run, 4, "state"))
        assert state["path"] == f"tinker://{run}/weights/state"
        weights = await a.done(await a.save_sampler(run, 5, "state"))
        assert weights["path"] == f"tinker://{run}/sampler_weights/state"

        sampler = await a.sampler(session, 0, weights["path"])
        assert (await a.get(f"/samplers/{sampler}"))["base_model"] == MODEL
        future = await a.sample(sampler, n=3, seed=7, prompt_logprobs=True, topk_prompt_logprobs=2)
        assert len(future["sample_sequence_ids"]) == 3
        drawn = await a.done(future)
        ids = [np.frombuffer(s.tokens, "<i4") for s in drawn.sequences]
        assert [len(i) for i in ids] == [4, 4, 4] or min(map(len, ids)) >= 1
        prompt = np.frombuffer(drawn.prompt_logprobs, "<f4")
        assert np.isnan(prompt[0]) and prompt[1] > -LOG16  # id 2 was trained
        assert np.frombuffer(drawn.topk_prompt_logprobs.token_ids, "<i4").tolist() == [0, 0, 2, 3]


async def test_a_sample_has_the_seed_it_is_given(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        session = await w.alice.session()
        sampler = await w.alice.sampler(session)
        tokens = []
        for seq, seed in enumerate((5, 5, 6)):
            drawn = await w.alice.done(await w.alice.sample(sampler, seq, n=2, seed=seed))
            tokens.append([s.tokens for s in drawn.sequences])
        assert tokens[0] == tokens[1]
        assert tokens[0] != tokens[2]
        assert tokens[0][0] != tokens[0][1]
        assert tokens[0][1] == tokens[2][0]  # the second sequence has the next seed


async def test_ephemeral_sampler_keeps_its_weights_while_training_goes_on(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session)
        body = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 0}
        reply = await a.done(await a.post("/save_weights_for_sampler", body))
        sampler = reply["sampling_session_id"]
        assert sampler == f"{session}:sample:0"
        await a.done(await a.train(run, 2, [1, 2, 3]))
        await a.done(await a.step(run, 3))
        drawn = await a.done(await a.sample(sampler, prompt=[1, 2], prompt_logprobs=True))
        assert np.frombuffer(drawn.prompt_logprobs, "<f4")[1] == pytest.approx(-LOG16)


async def test_inflight_samplers_share_the_newest_weights(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session)

        async def publish(seq: int, number: int) -> str:
            body = {
                "model_id": run,
                "seq_id": seq,
                "sampling_session_seq_id": number,
                "kind": "inflight",
            }
            reply = await a.done(await a.post("/save_weights_for_sampler", body))
            return reply["sampling_session_id"]

        first = await publish(1, 0)
        await a.done(await a.train(run, 2, [1, 2]))
        await a.done(await a.step(run, 3))
        await publish(4, 1)
        drawn = await a.done(await a.sample(first, prompt=[1, 2], prompt_logprobs=True))
        assert np.frombuffer(drawn.prompt_logprobs, "<f4")[1] > -LOG16 + 0.01
        assert len(w.host.snapshots) == 1  # the older one has been given back
