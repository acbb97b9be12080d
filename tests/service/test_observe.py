"""What an observer of the service sees: spans, measures and logs, by tenant, and no secrets."""

from __future__ import annotations

import gzip
import logging
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk._logs import LoggingHandler

from astuner.errors import ConfigError
from astuner.service.observe import Observer, observer
from tests.service.world import KEYS, world


class Collector(HTTPServer):
    """An OTLP collector that keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[tuple[str, bytes, str]] = []

    def bodies(self, path: str) -> list[bytes]:
        return [body for p, body, _ in self.received if p == path]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.received.append((self.path, body, self.headers.get("x-collector", "")))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()


async def test_traces_metrics_and_logs_reach_the_collector(
    tmp_path: Path, collector: Collector
) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    seeing = observer("otlp", endpoint, interval=60, headers={"x-collector": "yes"})
    async with world(tmp_path, observer=seeing) as w:
        a = w.alice
        session = await a.session()
        run = await a.create(session)
        await a.done(await a.train(run, 1, [1, 2, 3]))
        await a.failure(await a.train(run, 2, [1, 99]))
        sampler = await a.sampler(session)
        await a.done(await a.sample(sampler, n=2, max_tokens=3, stop=[]))
        logging.getLogger("astuner.service.x").error("the disk is full")
    # Closing has sent everything, and nothing is sent afterwards.
    assert not any(isinstance(h, LoggingHandler) for h in logging.getLogger("astuner").handlers)
    assert any(b"the disk is full" in body for body in collector.bodies("/v1/logs"))
    assert {header for _, _, header in collector.received} == {"yes"}
    everything = b"".join(body for _, body, _ in collector.received)
    assert all(key.encode() not in everything for key in KEYS.values())
    spans = {
        span.name
        for body in collector.bodies("/v1/traces")
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }
    assert {"operation forward_backward", "operation sample", "POST /api/v1/asample"} <= spans
    found = {
        metric.name: metric
        for body in collector.bodies("/v1/metrics")
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    sampled = found["astuner.tokens.sampled"].sum.data_points
    assert [(p.as_int, p.attributes[0].value.string_value) for p in sampled] == [(6, "alice")]
    assert found["astuner.tokens.trained"].sum.data_points[0].as_int == 2
    failures = found["astuner.operation.failures"].sum.data_points
    assert [p.as_int for p in failures] == [1]
    for name, value in (
        ("astuner.queue.operations", 0.0),
        ("astuner.adapters", 1.0),
        ("astuner.samplers", 1.0),
        ("astuner.tokens_per_second", 0.6),
    ):
        (point,) = found[name].gauge.data_points
        assert point.as_double == pytest.approx(value), name
        assert [a.value.string_value for a in point.attributes] == ["alice"]


async def test_the_console_shows_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with world(tmp_path, observer=observer("console", interval=60)) as w:
        await w.alice.session()
    out = capfd.readouterr().out
    assert '"name": "POST /api/v1/create_session"' in out
    assert '"tenant": "alice"' in out
    assert "astuner.request.duration" in out


async def test_every_answer_has_a_request_id(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        ids = set()
        for path in ("/healthz", "/nothing", "/sessions"):
            response = await w.alice.call("GET", path)
            ids.add(response.headers["x-request-id"])
        assert len(ids) == 3 and all(len(i) == 32 for i in ids)


def test_without_configuration_nothing_is_seen() -> None:
    quiet = observer("none")
    assert type(quiet) is Observer
    with quiet.request("x", "y") as seen, quiet.operation("x", "y"):
        seen["a"] = 1
    with pytest.raises(ConfigError, match="none, otlp or console"):
        observer("smoke signals")


async def test_paths_of_users_become_no_names_of_measures(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    class Noting(Observer):
        @contextmanager
        def request(self, method: str, request_id: str) -> Generator[dict[str, Any]]:
            attributes: dict[str, Any] = {}
            yield attributes
            seen.append((method, attributes["http.route"]))

    async with world(tmp_path, observer=Noting()) as w:
        run = await w.alice.create(await w.alice.session())
        await w.alice.done(await w.alice.save(run, 1, "step_one"))
        seen.clear()
        await w.alice.call("DELETE", f"/training_runs/{run}/checkpoints/weights/step_one")
        for path in ("/api/v1/made_up", "/abc", "/v1/made_up"):
            await w.http.get(path)
        await w.http.request("MADEUP", "/abc")
    checkpoint = "/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}"
    assert seen == [
        ("DELETE", checkpoint),
        ("GET", "other"),
        ("GET", "other"),
        ("GET", "other"),
        ("other", "other"),
    ]
