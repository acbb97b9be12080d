"""The configuration of the fine-tuning service: every key, its default and what it means.

A file of its own kind, with the root key `service`, read with the discipline of the run's
configuration: unknown keys are errors, every problem is reported with its line. Nothing
heavy is imported, and nothing on disk is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from astuner.config.keys import Table, get, nearest_choice
from astuner.config.load import load_table
from astuner.config.loaded import joined
from astuner.errors import ConfigError


@dataclass
class ServedModel:
    """The base model that everything is an adapter of."""

    path: str = "smollm2-135m"
    """A transformers folder, a hub name such as "Qwen/Qwen2.5-0.5B-Instruct", or
    "smollm2-135m", which also comes from the package registry where no hub is reachable."""
    name: str = ""
    """How clients name it (`base_model=...`); empty takes `path` as it is written."""
    tokenizer_id: str = ""
    """What the SDK's `get_tokenizer()` loads on the client's machine: a hub name or a folder.
    Empty takes the path of the model's folder, which serves clients of this machine."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "mps"."""
    dtype: str = "auto"
    """Of weights and activations: "auto" (bfloat16 where it is fast), "bfloat16", "float32".
    The optimizer and the loss are always float32."""
    renderer: str = "auto"
    """Chat format of the OpenAI endpoints: "auto", "template" (the tokenizer's own chat
    template), or a family name of the `renderers` library such as "qwen3"."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false}."""
    max_model_len: int = 0
    """Context limit in tokens; 0 takes the model's own."""
    lora_alpha: float = 32.0
    """An adapter's output is scaled by this over its rank, whatever rank a client asks for."""
    micro_batch_tokens: int = 4096
    """Tokens of one training micro-batch; bounds memory, never changes the gradient."""
    gradient_checkpointing: bool = False
    """Trade time for memory in training."""
    kv_cache_tokens: int = 0
    """Tokens whose keys and values are kept for prompts that begin like earlier ones; 0 takes
    15 % of the memory that is free once the model is loaded."""
    adapter_gib: float = 0.0
    """What adapters, their optimizers and sampling weights may take on a GPU; the rest waits
    in host memory. 0 takes a share of what is free."""


@dataclass
class LimitsConfig:
    """How much one tenant, one run and one request may take."""

    max_sessions: int = 100
    """Living sessions (`ServiceClient`s) of one tenant."""
    max_runs: int = 64
    """Adapters that one tenant may have in memory at a time."""
    max_rank: int = 256
    """Largest LoRA rank."""
    max_adapter_gib: float = 0.0
    """What one tenant's adapters and their optimizers may take of memory; 0 means half of the
    machine's."""
    max_waiting_operations: int = 1000
    """Operations of one run that may wait; more are told to come again (429)."""
    max_waiting_run_mib: int = 256
    """Data of one run's operations that may wait; more is told to come again (429)."""
    max_waiting_mib: int = 1024
    """The same of all runs; and of request bodies being read, of which one tenant may have half."""
    max_waiting_samples: int = 4096
    """Sequences of one tenant that may wait to be drawn; more are told to come again (429)."""
    max_samples: int = 1024
    """Sequences of one sample request."""
    max_running_samples: int = 128
    """Sequences of all tenants that are drawn at a time."""
    max_snapshots: int = 64
    """Sets of sampling weights in memory; others wait on disk."""
    max_run_samplers: int = 8
    """Sets of sampling weights without a checkpoint (`save_weights_and_get_sampling_client`) that
    one run keeps; samplers of those used longest ago are closed."""
    max_request_mib: int = 64
    """Largest request body; a larger one is refused (413)."""
    max_checkpoint_gib: float = 0.0
    """What one tenant's checkpoints may take on disk; 0 means no limit."""
    session_timeout: float = 600.0
    """Seconds without a heartbeat after which a session is over."""
    operation_timeout: float = 3600.0
    """Seconds that the engine may have one operation or sample request in hand before it is
    failed."""
    stuck_timeout: float = 600.0
    """Seconds that the engine may be at one and the same step before everything is failed, and
    the server is no longer healthy."""
    gap_timeout: float = 60.0
    """Seconds that operations wait for one before them that never arrives."""
    result_ttl: float = 3600.0
    """Seconds that an answer can still be fetched."""


@dataclass
class OtelConfig:
    """OpenTelemetry: traces, metrics and logs."""

    exporter: str = "none"
    """"none", "otlp" (over HTTP) or "console"."""
    endpoint: str = "http://127.0.0.1:4318"
    """The collector's base URL; /v1/traces, /v1/metrics and /v1/logs are added."""
    headers: dict[str, Any] = field(default_factory=dict)
    """Sent along with every export, e.g. an API key of the collector."""
    interval: float = 15.0
    """Seconds between two exports of metrics."""


@dataclass
class ServiceConfig:
    """Everything about the fine-tuning service."""

    model: ServedModel = field(default_factory=ServedModel)
    host: str = "127.0.0.1"
    """The address to listen at. Anything but loopback makes the service reachable by others."""
    port: int = 8765
    """0 takes a free one."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Tenant -> key, e.g. {alice: "tml-...", bob: "${oc.env:BOB_KEY}"}. Empty makes one key
    on the first start and keeps it in the data folder."""
    keys_file: str = ""
    """A file with one `tenant: key` a line, read besides `keys`."""
    data_dir: str = "service-data"
    """Checkpoints, records and the key are kept here."""
    persistence: str = "file"
    """Where records are kept: "file" (SQLite in data_dir), "redis", or "none" (all is
    forgotten when the server stops, checkpoints too)."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """For persistence: redis."""
    redis_prefix: str = "astuner"
    """In front of every key in Redis; one server, one prefix."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    otel: OtelConfig = field(default_factory=OtelConfig)


@dataclass
class ServiceRoot:
    """A file has one root key."""

    service: ServiceConfig = field(default_factory=ServiceConfig)


SERVICE = Table("service", ServiceConfig, ServiceRoot)

_CHOICES = {
    "model.device": ("auto", "cpu", "cuda", "mps"),
    "model.dtype": ("auto", "bfloat16", "float32"),
    "persistence": ("file", "redis", "none"),
    "otel.exporter": ("none", "otlp", "console"),
}
_FROM_ZERO = (
    "model.max_model_len",
    "model.kv_cache_tokens",
    "model.adapter_gib",
    "limits.max_checkpoint_gib",
    "limits.max_adapter_gib",
)


def load_service_config(path: str | Path | None, overrides: Sequence[str] = ()) -> ServiceConfig:
    """Read the YAML file (None: defaults only), then apply the overrides in order.

    Raises ConfigError with every problem found."""
    config, origins = load_table(SERVICE, None if path is None else Path(path), overrides)
    problems = [f"{origins[name]}: {message}" for name, message in _problems(config)]
    if problems:
        raise ConfigError(joined(problems))
    return config


def _problems(config: ServiceConfig) -> Iterator[tuple[str, str]]:
    for name, choices in _CHOICES.items():
        value = get(config, name)
        if value not in choices:
            near = nearest_choice(value, choices)
            hint = f" Did you mean {near!r}?" if near else ""
            yield name, f"service.{name} must be one of {', '.join(choices)}, not {value!r}.{hint}"
    numbers = [f"limits.{f.name}" for f in fields(LimitsConfig)]
    numbers += ["otel.interval", "model.micro_batch_tokens", "model.lora_alpha", *_FROM_ZERO]
    for name in dict.fromkeys(numbers):
        value = get(config, name)
        if value < 0 or (value == 0 and name not in _FROM_ZERO):
            least = "at least 0" if name in _FROM_ZERO else "above 0"
            yield name, f"service.{name} must be {least}; it is {value!r}."
    if not 0 <= config.port <= 65535:
        yield "port", f"service.port must be 0 to 65535; it is {config.port}."
