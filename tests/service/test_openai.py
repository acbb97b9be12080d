"""The OpenAI endpoints of the service: the base model and checkpoints, by the same keys."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.service.letters import LetterCodec
from tests.service.world import KEYS, MODEL, Client, World, world


def client_of(w: World, tenant: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://service/v1", api_key=KEYS[tenant], http_client=w.http, max_retries=0
    )


async def favourite(client: Client, letter: int, name: str = "s") -> str:
    """A checkpoint that answers with one letter only, and ends never."""
    run = await client.create(await client.session())
    for seq in range(1, 9, 2):
        await client.done(await client.train(run, seq, [1, *[letter] * 4]))
        await client.done(await client.step(run, seq + 1, lr=3.0))
    return (await client.done(await client.save_sampler(run, 9, name)))["path"]


async def test_agents_talk_to_checkpoints(tmp_path: Path) -> None:
    async with world(tmp_path, codec=LetterCodec()) as w:
        path = await favourite(w.alice, 3)
        openai_client = client_of(w, "alice")
        reply = await openai_client.chat.completions.create(
            model=path, messages=[{"role": "user", "content": "abc"}], max_tokens=5, logprobs=True
        )
        assert reply.choices[0].message.content == "ccccc"
        assert reply.choices[0].finish_reason == "length"
        assert reply.model == path
        assert reply.usage is not None and reply.usage.prompt_tokens == 3
        text = await openai_client.completions.create(model=path, prompt="ab", max_tokens=3)
        assert text.choices[0].text == "ccc"
        stream = await openai_client.chat.completions.create(
            model=path, messages=[{"role": "user", "content": "a"}], max_tokens=4, stream=True
        )
        shown = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
        assert shown == "cccc"
        base = await openai_client.completions.create(
            model=MODEL, prompt="a", max_tokens=8, seed=1, temperature=1.0
        )
        assert base.choices[0].text != "cccccccc"
        responses = await w.http.post(
            "/v1/responses",
            headers={"Authorization": f"Bearer {KEYS['alice']}"},
            json={"model": path, "input": "ab", "max_output_tokens": 4},
        )
        assert responses.json()["output"][0]["content"][0]["text"] == "cccc"
        assert {tenant for _, tenant in w.host.streams} == {"alice"}


async def test_models_are_the_base_and_ones_own_sampler_checkpoints(tmp_path: Path) -> None:
    async with world(tmp_path, codec=LetterCodec()) as w:
        path = await favourite(w.alice, 3)
        models = await client_of(w, "alice").models.list()
        assert [m.id for m in models.data] == [MODEL, path]
        assert [m.id for m in (await client_of(w, "bob").models.list()).data] == [MODEL]
        one = await w.http.get(f"/v1/models/{MODEL}", headers={"api-key": KEYS["bob"]})
        assert one.json()["id"] == MODEL


async def test_what_is_foreign_or_unknown_is_not_there(tmp_path: Path) -> None:
    async with world(tmp_path, codec=LetterCodec()) as w:
        path = await favourite(w.alice, 3)
        bob = client_of(w, "bob")
        for model in (path, f"{path}x", "gpt-9", "tinker://../../etc"):
            with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
                await bob.completions.create(model=model, prompt="a")
        stranger = openai.AsyncOpenAI(
            base_url="http://service/v1", api_key="nobody", http_client=w.http, max_retries=0
        )
        with pytest.raises(openai.AuthenticationError):
            await stranger.completions.create(model=MODEL, prompt="a")
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()
        base = f"/training_runs/{path[9:].split('/')[0]}/checkpoints/sampler_weights/s"
        await w.alice.call("POST", f"{base}/publish")
        reply = await bob.completions.create(model=path, prompt="a", max_tokens=2)
        assert reply.choices[0].text == "cc"


async def test_a_checkpoint_that_is_deleted_is_gone_here_too(tmp_path: Path) -> None:
    async with world(tmp_path, codec=LetterCodec()) as w:
        path = await favourite(w.alice, 3)
        alice = client_of(w, "alice")
        await alice.completions.create(model=path, prompt="a", max_tokens=1)
        run = path[9:].split("/")[0]
        await w.alice.call("DELETE", f"/training_runs/{run}/checkpoints/sampler_weights/s")
        with pytest.raises(openai.NotFoundError):
            await alice.completions.create(model=path, prompt="a")


async def test_requests_that_are_no_requests(tmp_path: Path) -> None:
    async with world(tmp_path, codec=LetterCodec(), max_request_bytes=1000) as w:
        headers = {"Authorization": f"Bearer {KEYS['alice']}"}

        async def post(**more: Any) -> httpx.Response:
            return await w.http.post("/v1/chat/completions", headers=headers, **more)

        for content in (b"", b"{", b"[]", b'{"model": 5}'):
            response = await post(content=content)
            assert response.status_code == 400, response.text
            assert "error" in response.json()
        assert (await post(content=b"x" * 2000)).status_code == 413
        assert (await w.http.get("/v1/nothing", headers=headers)).status_code == 404


async def test_a_prompt_that_fills_the_context_is_told_in_words_of_the_service(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, codec=LetterCodec()) as w:
        with pytest.raises(openai.BadRequestError) as caught:
            await client_of(w, "alice").completions.create(model=MODEL, prompt="a" * 64)
        assert caught.value.code == "context_length_exceeded"
        said = "The prompt has 64 tokens, but the limit is 64 tokens, the model's context."
        assert said in caught.value.message and "rollout." not in caught.value.message


async def test_chat_takes_turns_with_samples(tmp_path: Path) -> None:
    async with world(tmp_path, codec=LetterCodec(), max_running_samples=1) as w:
        alice = client_of(w, "alice")
        sampler = await w.bob.sampler(await w.bob.session())
        w.host.gate.clear()
        chats = [
            asyncio.create_task(alice.completions.create(model=MODEL, prompt="a", max_tokens=2))
            for _ in range(3)
        ]
        await w.until(lambda: w.service.drawing.queue.length("alice") == 2)
        future = await w.bob.sample(sampler)
        await asyncio.sleep(0.02)
        assert w.host.running == 1
        w.host.gate.set()
        await w.bob.done(future)
        await asyncio.gather(*chats)
        assert w.host.peak == 1
        assert [tenant for _, tenant in w.host.streams] == ["alice", "alice", "bob", "alice"]


async def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        with pytest.raises(openai.BadRequestError, match="render messages"):
            await client_of(w, "alice").completions.create(model=MODEL, prompt="a")


async def test_stop_strings_end_a_sample(tmp_path: Path) -> None:
    async with world(tmp_path, codec=LetterCodec()) as w:
        path = await favourite(w.alice, 3)
        sampler = await w.alice.sampler(await w.alice.session(), 0, path)
        for seq, stop in enumerate(("cc", ["xx", "cc"])):
            drawn = await w.alice.done(await w.alice.sample(sampler, seq, max_tokens=9, stop=stop))
            assert (len(drawn.sequences[0].tokens) // 4, drawn.sequences[0].stop_reason) == (2, 0)
        for seq, stop, length in ((5, [3], 1), (6, [], 9), (7, None, 9)):
            drawn = await w.alice.done(await w.alice.sample(sampler, seq, max_tokens=9, stop=stop))
            assert len(drawn.sequences[0].tokens) // 4 == length


async def test_a_model_that_is_replaced_or_deleted_is_given_back_when_nobody_uses_it(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, codec=LetterCodec()) as w:
        run = await w.alice.create(await w.alice.session())
        alice = client_of(w, "alice")

        async def reply(path: str) -> None:
            await alice.completions.create(model=path, prompt="a", max_tokens=2)

        path = (await w.alice.done(await w.alice.save_sampler(run, 1, "s")))["path"]
        base = f"/training_runs/{run}/checkpoints/sampler_weights/s"
        await reply(path)
        assert len(w.host.snapshots) == 1
        await w.alice.call("DELETE", base)
        await w.alice.done(await w.alice.save_sampler(run, 2, "s"))
        w.host.gate.clear()
        talking = asyncio.create_task(reply(path))
        await w.until(lambda: w.host.running == 1)
        assert len(w.host.snapshots) == 2
        await w.service.chores.once()
        assert len(w.host.snapshots) == 1  # the old one is gone, the new one at work
        await w.alice.call("DELETE", base)
        await w.service.chores.once()
        assert len(w.host.snapshots) == 1
        w.host.gate.set()
        await talking
        await w.service.chores.once()
        assert w.host.snapshots == {}
        assert list((tmp_path / "checkpoints").glob("*/*/*")) == []
