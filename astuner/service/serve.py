"""`astuner serve`: from a configuration to a listening server, and down again.

Loads the model, makes engine, store and app, says how to connect, and runs uvicorn until
it is told to stop (Ctrl-C or SIGTERM). `make_service` and `listen` are the parts, for
those who embed the service.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from astuner.algorithm.registry import find_kl, find_loss
from astuner.chat.protocol import ChatCodec
from astuner.config.service import LimitsConfig, ServiceConfig
from astuner.engine.protocol import AdapterHost
from astuner.errors import AstunerError, ConfigError
from astuner.service.base_model import BaseModel
from astuner.service.keys import Keys, read_keys
from astuner.service.limits import Limits
from astuner.service.observe import observer
from astuner.service.openai import OpenAIEndpoints
from astuner.service.service import Service
from astuner.service.store.memory import MemoryStore
from astuner.service.store.protocol import Store
from astuner.service.wire.app import build_app

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 120
SHUTDOWN_SECONDS = 5
BACKLOG = 2048


def serve(
    config: ServiceConfig,
    say: Callable[[str], None] = print,
    *,
    host: Callable[[ServiceConfig], tuple[BaseModel, ChatCodec | None]] | None = None,
) -> None:
    """Serve until told to stop. `host` makes the base model; the default loads the embedded
    engine. Raises ConfigError and ModelError before anything listens."""
    import uvicorn

    data_dir = _data_dir(config)
    bound = listen(config.host, config.port)
    try:
        keys = read_keys(config, data_dir)
        store = open_store(config, data_dir)
        say(f"Loading {config.model.path} ...")
        base, codec = (host or load_base)(config)
        service = make_service(config, base, codec, store, data_dir)
        app = build_app(service, keys.tenants, OpenAIEndpoints(service, keys.tenants))
        for line in greeting(config, base, keys, bound.getsockname()[1], data_dir):
            say(line)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        with _stopping_is_no_failure():
            server.run(sockets=[bound])
        close = getattr(base.host, "close", None)
        if close is not None:
            close()
    finally:
        bound.close()
        if config.persistence == "none":
            shutil.rmtree(data_dir, ignore_errors=True)


@contextmanager
def _stopping_is_no_failure() -> Generator[None]:
    """uvicorn raises the signal that stopped it once more when it is done; here that must not
    end the process before the rest is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def nothing(number: int, frame: object) -> None:
        """uvicorn has seen the signal."""

    before = {n: signal.signal(n, nothing) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_service(
    config: ServiceConfig,
    base: BaseModel,
    codec: ChatCodec | None,
    store: Store,
    data_dir: Path,
) -> Service:
    """The service of a configuration, not started yet."""
    otel = config.otel
    headers = {name: str(value) for name, value in otel.headers.items()}
    seeing = observer(otel.exporter, otel.endpoint, interval=otel.interval, headers=headers)
    return Service(
        base, store, data_dir, codec=codec, limits=limits_of(config.limits), observer=seeing
    )


def load_base(config: ServiceConfig) -> tuple[BaseModel, ChatCodec | None]:
    """The embedded engine and its codec; None where the tokenizer cannot render messages."""
    from astuner.chat import load_codec
    from astuner.engine.embedded.host import EmbeddedHost
    from astuner.engine.model_source import resolve_model

    model = config.model
    folder = resolve_model(model.path)
    host = EmbeddedHost.open(
        folder,
        device=model.device,
        dtype=model.dtype,
        max_context=model.max_model_len,
        max_num_seqs=config.limits.max_running_samples,
        kv_cache_tokens=model.kv_cache_tokens,
        adapter_bytes=int(model.adapter_gib * 2**30),
        micro_batch_tokens=model.micro_batch_tokens,
        gradient_checkpointing=model.gradient_checkpointing,
        losses=find_loss,
        kls=find_kl,
    )
    codec: ChatCodec | None = None
    try:
        codec = load_codec(
            host.tokenizer,
            renderer=model.renderer,
            template_kwargs=model.template_kwargs,
            model_name=model.path,
        )
    except AstunerError as error:
        logger.warning("%s The OpenAI chat endpoint and stop strings are off.", error)
    return base_of(config, host, folder), codec


def base_of(config: ServiceConfig, host: AdapterHost, folder: Path) -> BaseModel:
    """What is served, as clients see it."""
    from transformers import AutoConfig

    described: Any = AutoConfig.from_pretrained(folder)
    text: Any = described.get_text_config()
    return BaseModel(
        name=config.model.name or config.model.path,
        host=host,
        vocab_size=int(text.vocab_size),
        lora_alpha=config.model.lora_alpha,
        tokenizer_id=config.model.tokenizer_id or str(folder),
        arch=str(text.model_type),
    )


def open_store(config: ServiceConfig, data_dir: Path) -> Store:
    """Raises ConfigError, MissingDependency."""
    match config.persistence:
        case "none":
            return MemoryStore()
        case "redis":
            from astuner.service.store.redis import RedisStore

            return RedisStore(config.redis_url, config.redis_prefix)
        case _:
            from astuner.service.store.sqlite import SqliteStore

            return SqliteStore(data_dir / "records.sqlite")


def limits_of(config: LimitsConfig) -> Limits:
    """The same, in the service's own units. Raises ConfigError."""
    if config.max_waiting_mib < 2 * config.max_request_mib:
        raise ConfigError(
            f"service.limits.max_waiting_mib is {config.max_waiting_mib}: a request of "
            f"max_request_mib={config.max_request_mib} would never be let in, as one tenant may "
            "have half of it. Double it, or lower max_request_mib."
        )
    adapters = config.max_adapter_gib or psutil.virtual_memory().total / 2**31
    return Limits(
        max_sessions=config.max_sessions,
        max_runs=config.max_runs,
        max_rank=config.max_rank,
        max_adapter_bytes=int(adapters * 2**30),
        max_waiting_operations=config.max_waiting_operations,
        max_waiting_run_bytes=config.max_waiting_run_mib * 2**20,
        max_waiting_bytes=config.max_waiting_mib * 2**20,
        max_waiting_samples=config.max_waiting_samples,
        max_samples=config.max_samples,
        max_running_samples=config.max_running_samples,
        max_snapshots=config.max_snapshots,
        max_run_samplers=config.max_run_samplers,
        max_request_bytes=config.max_request_mib * 2**20,
        max_checkpoint_bytes=int(config.max_checkpoint_gib * 2**30),
        session_timeout=config.session_timeout,
        operation_timeout=config.operation_timeout,
        stuck_timeout=config.stuck_timeout,
        gap_timeout=config.gap_timeout,
        result_ttl=config.result_ttl,
    )


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"service.port: cannot listen at {host}:{port} ({error.strerror or error}). Is another "
            "server running there? Choose another port, or port=0 for a free one."
        ) from error
    return bound


def greeting(
    config: ServiceConfig, base: BaseModel, keys: Keys, port: int, data_dir: Path
) -> list[str]:
    """How to connect, and what to mind."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    url = f"http://{f'[{name}]' if ':' in name else name}:{port}"
    file = keys.file and keys.file.resolve()
    shown = keys.new_key or (f"$(cat {shlex.quote(str(file))})" if file else "...")
    lines = [f"Serving {base.name} at {url} for {', '.join(keys.tenants.keys)}."]
    if keys.new_key:
        lines.append(f"The key, shown this once and kept in {file}: {keys.new_key}")
    elif file is not None:
        lines.append(f"The key is in {file}.")
    lines += [
        "Connect with the tinker SDK:",
        f"    export TINKER_BASE_URL={url} TINKER_API_KEY={shown}",
        "    python -c 'import tinker; "
        "print(tinker.RestClient().get_server_capabilities().result())'",
        "or, where it is SDK 0.25:",
        "    python -c 'import tinker; print(tinker.ServiceClient().get_server_capabilities())'",
        f"or with any OpenAI client: base_url={url}/v1, the same key, model={base.name!r}.",
    ]
    if config.persistence == "none":
        lines.append("Nothing is kept when this server stops (persistence: none).")
    else:
        lines.append(f"Records and checkpoints are kept in {data_dir.resolve()}.")
    if config.host not in ("127.0.0.1", "localhost", "::1"):
        lines.append(
            "Reachable from other machines, without encryption: keys travel in the clear unless "
            "a proxy with TLS stands before it."
        )
    lines.append("Ctrl-C stops it.")
    return lines


def _data_dir(config: ServiceConfig) -> Path:
    if config.persistence == "none":
        return Path(tempfile.mkdtemp(prefix="astuner-service-"))
    folder = Path(config.data_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"service.data_dir: {folder} cannot be made: {error.strerror}."
        ) from error
    return folder
