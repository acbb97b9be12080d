"""Checkpoints to take home: a tar file by a URL that is good for a while.

Asking for the archive needs the key; the URL that comes back does not, as a signed URL
would not: whoever knows it may fetch it until it expires. URLs end with the server. Only
what PEFT reads is in the archive, never the optimizer.
"""

from __future__ import annotations

import asyncio
import secrets
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from astuner.errors import RequestError
from astuner.service.names import checkpoint_path
from astuner.service.service import Service

SECONDS = 900.0
BLOCK = 2**20
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class _Ticket:
    folder: Path
    name: str
    expires_at: float
    """Unix seconds."""


class ArchiveEndpoints:
    """See the module."""

    PUBLIC = "/archives/{ticket}"
    """The one path that needs no key."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tickets: dict[str, _Ticket] = {}

    def routes(self) -> Iterator[tuple[str, str, Any]]:
        yield "GET", "/training_runs/{run_id}/checkpoints/{kind}/{name}/archive", self.url
        yield "GET", self.PUBLIC, self.fetch

    async def url(self, request: Request, tenant: str) -> Response:
        """Where the archive of a checkpoint that the tenant may read can be fetched."""
        p = request.path_params
        path = checkpoint_path(p["run_id"], p["kind"], p["name"])
        record = self._service.checkpoints.find(path, tenant, reading=True)
        now = time.time()
        self._tickets = {k: t for k, t in self._tickets.items() if t.expires_at > now}
        ticket = secrets.token_urlsafe(32)
        folder = self._service.checkpoints.folder(record)
        self._tickets[ticket] = _Ticket(folder, path.name, now + SECONDS)
        base = str(request.base_url).rstrip("/")
        expires = datetime.fromtimestamp(now + SECONDS, UTC).isoformat()
        return JSONResponse({"url": f"{base}/api/v1/archives/{ticket}", "expires": expires})

    async def fetch(self, request: Request, tenant: str) -> Response:
        """The tar file."""
        ticket = self._tickets.get(request.path_params["ticket"])
        if ticket is None or ticket.expires_at <= time.time() or not ticket.folder.is_dir():
            raise _expired()
        try:
            file, size = await asyncio.to_thread(_packed, ticket)
        except FileNotFoundError:  # deleted just now
            raise _expired() from None
        length = {"content-length": str(size)}
        return StreamingResponse(_blocks(file), media_type="application/x-tar", headers=length)


def _expired() -> RequestError:
    return RequestError(
        "This URL has expired. Ask for the checkpoint's archive again.",
        status=404,
        code="no_such_archive",
    )


def _packed(ticket: _Ticket) -> tuple[IO[bytes], int]:
    """The tar as a file without a name, which is gone when nobody reads it any more; its size."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by who reads it
    try:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name in FILES:
                tar.add(ticket.folder / name, f"{ticket.name}/{name}")
        size = file.tell()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file, size


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while block := file.read(BLOCK):
            yield block
