"""Fetches an adapter from a service, as PEFT writes it, and says how to open it.

By the API's checkpoint archive: a request that is answered with the URL of a tar file (in
JSON or as a redirect), good for a while and for whoever knows it. Only the two files of an
adapter are taken out of it.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path

import httpx

from astuner.backbone.report import SERVICE_STATE
from astuner.backbone.tinker.connection import Connection
from astuner.backbone.tinker.policy import TinkerPolicy
from astuner.config.schema import AstunerConfig, LoraConfig
from astuner.engine.embedded.peft_format import ADAPTER, CONFIG
from astuner.errors import CheckpointError

PREFIX = "tinker://"
SECONDS = 60.0
"""The longest silence of a download."""


async def fetch_adapter(policy: TinkerPolicy, folder: Path) -> None:
    """The weights as they are trained now, into `folder`. Raises CheckpointError where the
    service has no archives, EngineError."""
    path = await policy.save_for_sampler(f"final-{uuid.uuid4().hex[:8]}")
    await download(policy.connection, path, folder)


async def download(connection: Connection, path: str, folder: Path) -> None:
    """A checkpoint by its path, tinker://RUN/KIND/NAME."""
    run, _, checkpoint = path.removeprefix(PREFIX).partition("/")
    url = f"{connection.base_url}/api/v1/training_runs/{run}/checkpoints/{checkpoint}/archive"
    try:
        async with httpx.AsyncClient(timeout=SECONDS) as client:
            archive = await _archive_url(client, url, connection.api_key or "")
            with tempfile.TemporaryFile() as file:
                async with client.stream("GET", archive, follow_redirects=True) as response:
                    response.raise_for_status()
                    async for block in response.aiter_bytes():
                        file.write(block)
                file.seek(0)
                with tarfile.open(fileobj=file) as tar:
                    _take(tar, folder)
    except (httpx.HTTPError, httpx.InvalidURL, tarfile.TarError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} could not be fetched from {connection.base_url}: {error}."
        ) from error


async def _archive_url(client: httpx.AsyncClient, url: str, key: str) -> str:
    answer = await client.get(url, headers={"X-API-Key": key, "accept": "application/json"})
    if answer.is_redirect:
        return answer.headers["location"]
    answer.raise_for_status()
    return answer.json()["url"]


def _take(tar: tarfile.TarFile, folder: Path) -> None:
    """The adapter's files, wherever in the archive they are. Raises KeyError."""
    members = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}
    for name in (ADAPTER, CONFIG):
        content = tar.extractfile(members[name])
        assert content is not None  # it is a file
        (folder / name).write_bytes(content.read())


# ---------------------------------------------------------------- what was fetched


def as_fetched(config: AstunerConfig, checkpoint: Path | None) -> AstunerConfig:
    """The configuration that a checkpoint opens with: of one that a service trained, the shape
    is in the adapter's own file, for the service chose the alpha. Raises CheckpointError."""
    if checkpoint is None or not (checkpoint / SERVICE_STATE).is_file():
        return config
    try:
        found = json.loads((checkpoint / CONFIG).read_text())
        lora = LoraConfig(
            enable=True,
            rank=int(found["r"]),
            alpha=int(found["lora_alpha"]),
            target_modules=",".join(found["target_modules"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The weights of {checkpoint} are on the service that {SERVICE_STATE} in it names, and "
            f"were not fetched from there ({error})."
        ) from error
    return replace(config, model=replace(config.model, lora=lora))
