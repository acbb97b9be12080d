"""The run's own service, for real, and the validation that the launcher makes over it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from astuner.backbone.assembly import UserParts
from astuner.backbone.trinity import checkpoints, final
from astuner.backbone.trinity.service_child import start_service
from astuner.config.load import from_python
from astuner.errors import BackboneError
from astuner.task_reader import TaskSplits
from tests.tiny_run import EarlyLetters, tasks, tiny_job

tinker = pytest.importorskip("tinker", reason="the SDK comes with astuner[service]")
pytestmark = pytest.mark.timeout(300)


async def test_the_last_weights_are_validated_over_the_service(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = from_python(tiny_job(tiny_model_dir, tmp_path).config).config
    folder = tmp_path / "trinity"
    service = await start_service(config, tiny_model_dir, folder)
    try:
        client = tinker.ServiceClient(base_url=service.url, api_key=service.key)
        training = await client.create_lora_training_client_async(str(tiny_model_dir), rank=4)
        path = (await (await training.save_state_async("checkpoints-trinity-state-2"))).path
        parts = UserParts(EarlyLetters, None, TaskSplits(tasks(4), tasks(2)))
        access = (service.url, service.key)
        episodes = await final.validate(config, parts, tiny_model_dir, access, path, 2)
        assert [e.ok for e in episodes] == [True, True]
        assert {int(v) for e in episodes for c in e.calls for v in c.weight_versions} == {2}
        weights = checkpoints.service_folder(tmp_path, path)
        assert weights is not None
        assert all((weights / name).is_file() for name in checkpoints.ADAPTER)
    finally:
        service.close()
    assert service.child.ended() is not None


async def only_healthy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says that it is well, and answers nothing else."""
    if b"healthz" in await reader.readline():
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()


@pytest.mark.parametrize("listens", [True, False])
async def test_a_service_that_does_not_answer_is_not_waited_for_for_ever(
    tiny_model_dir: Path, tmp_path: Path, listens: bool
) -> None:
    job = tiny_job(tiny_model_dir, tmp_path)
    job.config.rollout.call_timeout = 2.0
    parts = UserParts(EarlyLetters, None, TaskSplits(tasks(4), tasks(2)))
    server = await asyncio.start_server(only_healthy, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    if not listens:
        server.close()
    access = (url, "tml-key-of-nobody")
    validation = final.validate(
        job.config, parts, tiny_model_dir, access, "tinker://r/weights/s", 2
    )
    with pytest.raises(BackboneError, match=r"tinker://r/weights/s within 2 s \(rollout"):
        await asyncio.wait_for(validation, 100)
    server.close()
