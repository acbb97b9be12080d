"""The scripted judge of the rubric tutorial, served."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import uvicorn

from tutorial.example_rubric_judge.scripted_judge import app


@pytest.fixture
def judge_url() -> Iterator[str]:
    """Its address: a free port, and a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join(10)
