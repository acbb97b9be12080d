"""The real service over the tiny Llama, on a loopback port of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from astuner import AstunerJob
from astuner.config.service import ServiceConfig
from astuner.service.keys import read_keys
from astuner.service.openai import OpenAIEndpoints
from astuner.service.serve import listen, load_base, make_service, open_store
from astuner.service.wire.app import build_app
from tests.tiny_run import EarlyLetters, tiny_job

KEY = "tml-test-key-12345"


class Running:
    """A service that runs until it is closed."""

    def __init__(self, model: Path, data: Path, port: int = 0) -> None:
        config = ServiceConfig(keys={"me": KEY}, data_dir=str(data), port=port)
        config.model.path, config.model.name, config.model.dtype = str(model), "tiny", "float32"
        config.model.device, config.model.lora_alpha = "cpu", 8
        data.mkdir(parents=True, exist_ok=True)
        self._socket = listen("127.0.0.1", port)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.base, codec = load_base(config)
        self.service = make_service(config, self.base, codec, open_store(config, data), data)
        tenants = read_keys(config, data).tenants
        app = build_app(self.service, tenants, OpenAIEndpoints(self.service, tenants))
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.daemon = True
        self._thread.start()
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while not self._server.started:
            assert time.monotonic() < deadline and self._thread.is_alive()
            time.sleep(0.01)

    def close(self) -> None:
        """May be called twice."""
        self._server.should_exit = True
        self._thread.join(30)
        host: Any = self.base.host
        host.close()
        self._socket.close()


@contextmanager
def running(model: Path, data: Path, port: int = 0) -> Generator[Running]:
    service = Running(model, data, port)
    try:
        yield service
    finally:
        service.close()


def remote_job(
    url: str, model: Path, runs: Path, workflow: type = EarlyLetters, **trainer: Any
) -> AstunerJob:
    """The tiny job on the service."""
    job = tiny_job(model, runs, workflow, **trainer)
    job.config.backbone = "tinker"
    job.config.model.lora.alpha = 32
    job.config.service.base_url = url
    return job
