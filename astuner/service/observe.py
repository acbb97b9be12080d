"""What can be seen of a running service: traces, metrics and logs by OpenTelemetry.

`Observer` is what the other modules call; without OpenTelemetry it does nothing but cost
a method call. `start` sets up the SDK with OTLP or console exporters. Spans are of HTTP
requests and of operations; all instruments carry the tenant. No prompt, token or key is
ever recorded.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

from astuner.errors import ConfigError, MissingDependency

RATE_SECONDS = 10.0
OURS = "astuner"
"""The root of our loggers."""
Gauge = Callable[[], Iterable[tuple[float, Mapping[str, str]]]]
"""Values and their attributes, asked for whenever metrics are exported."""


class Observer:
    """Sees nothing."""

    @contextmanager
    def request(self, method: str, request_id: str) -> Generator[dict[str, Any]]:
        """One HTTP request; what is put into the mapping becomes attributes: `http.route`, a
        route's template (never a path from outside, of which there is no end), names it."""
        yield {}

    @contextmanager
    def operation(self, kind: str, tenant: str) -> Generator[None]:
        """One operation on the device."""
        yield

    def trained(self, tenant: str, tokens: int) -> None:
        """Tokens went into a gradient."""

    def failed(self, kind: str, tenant: str, category: str) -> None:
        """An operation was answered with an error."""

    def sampled(self, tenant: str, tokens: int, prompt_tokens: int) -> None:
        """Tokens were drawn."""

    def rates(self) -> Mapping[str, float]:
        """Sampled tokens a second of each tenant, over the last ten seconds."""
        return {}

    def gauge(self, name: str, unit: str, read: Gauge) -> None:
        """A value to be read at every export, from a thread of the exporter's."""

    def close(self) -> None:
        """Send what has not been sent."""


class Telemetry(Observer):
    """Sees with OpenTelemetry."""

    def __init__(
        self, exporter: str, endpoint: str, *, interval: float, headers: Mapping[str, str]
    ) -> None:
        """`exporter` is "otlp" or "console". Raises MissingDependency, ConfigError."""
        *providers, self._handler = _providers(exporter, endpoint, interval, headers)
        self._providers = providers
        logging.getLogger(OURS).addHandler(self._handler)
        self._tracer = providers[0].get_tracer("astuner.service")
        meter = providers[1].get_meter("astuner.service")
        self._meter = meter
        self._requests = meter.create_histogram("astuner.request.duration", unit="s")
        self._operations = meter.create_histogram("astuner.operation.duration", unit="s")
        self._failures = meter.create_counter("astuner.operation.failures")
        self._trained = meter.create_counter("astuner.tokens.trained", unit="{token}")
        self._sampled = meter.create_counter("astuner.tokens.sampled", unit="{token}")
        self._prompts = meter.create_counter("astuner.tokens.prompt", unit="{token}")
        self._lately: deque[tuple[float, str, int]] = deque()
        """When, whose and how many tokens were sampled."""

    @contextmanager
    def request(self, method: str, request_id: str) -> Generator[dict[str, Any]]:
        seen: dict[str, Any] = {"request.id": request_id}
        started = time.perf_counter()
        with self._tracer.start_as_current_span(method) as span:
            try:
                yield seen
            finally:
                name = f"{method} {seen.get('http.route', 'other')}"
                span.update_name(name)
                span.set_attributes(seen)
                labels = {"route": name, "status": str(seen.get("http.response.status_code", ""))}
                self._requests.record(time.perf_counter() - started, labels)

    @contextmanager
    def operation(self, kind: str, tenant: str) -> Generator[None]:
        labels = {"operation": kind, "tenant": tenant}
        started = time.perf_counter()
        with self._tracer.start_as_current_span(f"operation {kind}", attributes=labels):
            try:
                yield
            finally:
                self._operations.record(time.perf_counter() - started, labels)

    def trained(self, tenant: str, tokens: int) -> None:
        self._trained.add(tokens, {"tenant": tenant})

    def failed(self, kind: str, tenant: str, category: str) -> None:
        self._failures.add(1, {"operation": kind, "tenant": tenant, "category": category})

    def sampled(self, tenant: str, tokens: int, prompt_tokens: int) -> None:
        self._sampled.add(tokens, {"tenant": tenant})
        self._prompts.add(prompt_tokens, {"tenant": tenant})
        now = time.monotonic()
        self._lately.append((now, tenant, tokens))
        while self._lately[0][0] < now - RATE_SECONDS:
            self._lately.popleft()

    def rates(self) -> Mapping[str, float]:
        since, counts = time.monotonic() - RATE_SECONDS, Counter[str]()
        for when, tenant, tokens in list(self._lately):
            counts[tenant] += tokens * (when >= since)
        return {tenant: tokens / RATE_SECONDS for tenant, tokens in counts.items()}

    def gauge(self, name: str, unit: str, read: Gauge) -> None:
        from opentelemetry.metrics import CallbackOptions, Observation

        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, dict(labels)) for value, labels in read()]

        self._meter.create_observable_gauge(name, [observe], unit=unit)

    def close(self) -> None:
        logging.getLogger(OURS).removeHandler(self._handler)
        for provider in self._providers:
            provider.shutdown()


def observer(
    exporter: str, endpoint: str = "", *, interval: float = 15.0, headers: Mapping[str, str] = {}
) -> Observer:
    """The observer for a configuration; "none" sees nothing."""
    if exporter == "none":
        return Observer()
    return Telemetry(exporter, endpoint, interval=interval, headers=headers)


def _providers(
    exporter: str, endpoint: str, interval: float, headers: Mapping[str, str]
) -> tuple[Any, Any, Any, logging.Handler]:
    """Tracer, meter and logger provider, and what hands our log to the last. None of them is
    installed globally."""
    try:
        from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise MissingDependency("opentelemetry-sdk", "otel", "service.otel.exporter") from error
    spans, metrics, logs = _exporters(exporter, endpoint, headers)
    resource = Resource.create({"service.name": "astuner"})
    tracers = TracerProvider(resource=resource)
    tracers.add_span_processor(BatchSpanProcessor(spans))
    reader = PeriodicExportingMetricReader(metrics, export_interval_millis=interval * 1000)
    meters = MeterProvider(metric_readers=[reader], resource=resource)
    loggers = LoggerProvider(resource=resource)
    loggers.add_log_record_processor(BatchLogRecordProcessor(logs))
    return tracers, meters, loggers, LoggingHandler(logger_provider=loggers)


def _exporters(exporter: str, endpoint: str, headers: Mapping[str, str]) -> tuple[Any, Any, Any]:
    if exporter == "console":
        from opentelemetry.sdk._logs.export import ConsoleLogRecordExporter
        from opentelemetry.sdk.metrics.export import ConsoleMetricExporter
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        out = sys.stdout  # their own default is the stdout of when they were imported
        return (
            ConsoleSpanExporter(out=out),
            ConsoleMetricExporter(out=out),
            ConsoleLogRecordExporter(out=out),
        )
    if exporter != "otlp":
        raise ConfigError(f"service.otel.exporter must be none, otlp or console, not {exporter!r}.")
    try:
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        package = "opentelemetry-exporter-otlp-proto-http"
        raise MissingDependency(package, "otel", "service.otel.exporter: otlp") from error
    base = endpoint.rstrip("/")
    return (
        OTLPSpanExporter(f"{base}/v1/traces", headers=dict(headers)),
        OTLPMetricExporter(f"{base}/v1/metrics", headers=dict(headers)),
        OTLPLogExporter(f"{base}/v1/logs", headers=dict(headers)),
    )
