"""The configuration of the service, and `astuner serve` as a process of its own."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tinker.proto import tinker_public_pb2 as pb

from astuner.config.service import ServiceConfig, load_service_config
from astuner.errors import ConfigError, MissingDependency
from astuner.service.base_model import BaseModel
from astuner.service.keys import Keys, read_keys
from astuner.service.serve import greeting, limits_of, listen, open_store
from astuner.service.store.memory import MemoryStore
from astuner.service.tenants import Tenants
from tests.service.server import Server, tiny_server
from tests.service.unigram import UnigramHost
from tests.service.world import sample_body


def write(folder: Path, text: str) -> Path:
    path = folder / "service.yaml"
    path.write_text(text)
    return path


def test_a_file_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOB_KEY", "tml-from-the-environment")
    path = write(
        tmp_path,
        "service:\n"
        "  model: {path: x/y, dtype: float32}\n"
        '  keys: {alice: tml-alice-key-1, bob: "${oc.env:BOB_KEY}"}\n'
        "  limits: {max_runs: 3, max_checkpoint_gib: 0.5}\n",
    )
    config = load_service_config(
        path, ["port=0", "service.limits.max_rank=16", "keys.carol=tml-carol-k"]
    )
    assert (config.model.path, config.model.dtype, config.port) == ("x/y", "float32", 0)
    assert config.keys == {
        "alice": "tml-alice-key-1",
        "bob": "tml-from-the-environment",
        "carol": "tml-carol-k",
    }
    limits = limits_of(config.limits)
    assert (limits.max_runs, limits.max_rank) == (3, 16)
    assert limits.max_adapter_bytes == pytest.approx(psutil.virtual_memory().total / 2, abs=1)
    config.limits.max_adapter_gib = 1.5
    assert limits_of(config.limits).max_adapter_bytes == 1.5 * 2**30
    config.limits.max_waiting_mib = 127
    with pytest.raises(ConfigError, match="would never be let in"):
        limits_of(config.limits)
    assert (limits.max_checkpoint_bytes, limits.max_request_bytes) == (2**29, 64 * 2**20)


def test_defaults_are_loopback_and_kept() -> None:
    config = load_service_config(None)
    assert (config.host, config.persistence, config.otel.exporter) == ("127.0.0.1", "file", "none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("astuner: {}", "has no root key `service`"),
        ("service: {modell: {}}", "unknown key `service.modell`; did you mean `service.model`"),
        ("service: {limits: {max_run: 1}}", "service.yaml:1.*did you mean"),
        ("service: {port: many}", "`service.port` must be a whole number"),
        ("service: {port: 70000}", "must be 0 to 65535"),
        ("service: {persistence: sqlite}", "one of file, redis, none"),
        ("service: {limits: {max_runs: 0}}", "max_runs must be above 0"),
        ("service: {otel: {exporter: otpl}}", "Did you mean 'otlp'"),
        ("service: {model: {path: x}, model: {path: y}}", "already set"),
        ("service: 5", "must hold a mapping"),
    ],
)
def test_what_cannot_be_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_service_config(write(tmp_path, text))


def test_overrides_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"unknown key `service.ports`"):
        load_service_config(None, ["ports=1"])
    with pytest.raises(ConfigError, match="malformed"):
        load_service_config(None, ["port"])


def test_keys_come_from_the_config_a_file_or_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("bob: tml-bob-key-22\n")
    config = ServiceConfig(keys={"a": "tml-aaaaaaaaaa"}, keys_file=str(tmp_path / "keys"))
    assert read_keys(config, tmp_path).tenants.keys == {
        "a": "tml-aaaaaaaaaa",
        "bob": "tml-bob-key-22",
    }
    made = read_keys(ServiceConfig(), tmp_path)
    again = read_keys(ServiceConfig(), tmp_path)
    assert made.new_key and not again.new_key
    assert made.tenants == again.tenants
    (tmp_path / "keys").write_text("- a list\n")
    with pytest.raises(ConfigError, match="alice: tml-"):
        read_keys(config, tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(ServiceConfig(keys_file="/nowhere/keys"), tmp_path)


def test_the_greeting_says_how_to_connect_and_shows_a_key_once(tmp_path: Path) -> None:
    base = BaseModel("tiny", UnigramHost(), 16)
    tenants = Tenants({"default": "tml-secret-secret"})
    first = Keys(tenants, "tml-secret-secret", tmp_path / "api-key")
    text = "\n".join(greeting(ServiceConfig(), base, first, 8765, tmp_path))
    assert "http://127.0.0.1:8765" in text and "tml-secret-secret" in text
    later = "\n".join(
        greeting(ServiceConfig(), base, Keys(tenants, "", tmp_path / "api-key"), 1, tmp_path)
    )
    assert "tml-secret-secret" not in later and f"$(cat {tmp_path}/api-key)" in later
    public = ServiceConfig(host="0.0.0.0", persistence="none")
    text = "\n".join(greeting(public, base, Keys(tenants), 1, tmp_path))
    assert "in the clear" in text and "Nothing is kept" in text and "secret" not in text


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match=r"service\.port: cannot listen"):
            listen("127.0.0.1", other.getsockname()[1])


def test_stores_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_store(ServiceConfig(persistence="none"), tmp_path), MemoryStore)
    open_store(ServiceConfig(), tmp_path).close()
    assert (tmp_path / "records.sqlite").exists()
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    with pytest.raises(MissingDependency, match=r'pip install "astuner\[service-redis\]"'):
        open_store(ServiceConfig(persistence="redis"), tmp_path)


# ---------------------------------------------------------------- a process


@pytest.mark.timeout(300)
def test_serve_starts_says_how_to_connect_and_stops_when_told(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    with tiny_server(tiny_model_dir, tmp_path) as server:
        assert httpx.get(f"{server.url}/api/v1/healthz").json() == {"status": "ok"}
        assert f"Serving tiny at {server.url} for default" in server.output()
        assert server.key in server.output()
        connect_as_told(server)
        assert server.stop(signal.SIGTERM) == 0
    with tiny_server(tiny_model_dir, tmp_path) as server:
        assert server.key not in server.output()
        headers = {"X-API-Key": server.key}
        models = httpx.get(f"{server.url}/api/v1/get_server_capabilities", headers=headers).json()
        assert models["supported_models"][0]["max_context_length"] == 1024
        assert server.stop(signal.SIGINT) == 0


def connect_as_told(server: Server) -> None:
    """With the lines that it prints, which the SDK must not call old."""
    told = [line.strip() for line in server.output().splitlines() if line.startswith("    ")]
    assert [line.split()[0] for line in told] == ["export", "python", "python"]
    del told[2]  # for an older SDK
    told[1] = told[1].replace("python", f"{shlex.quote(sys.executable)} -W error:DEPRECATED", 1)
    done = subprocess.run(
        ["sh", "-c", "\n".join(told)], capture_output=True, text=True, timeout=100
    )
    assert "SupportedModel(model_name='tiny', max_context_length=1024" in done.stdout, done.stderr


@pytest.mark.timeout(300)
async def test_two_hundred_clients_over_sockets(tmp_path: Path, tiny_model_dir: Path) -> None:
    """All of them at once, each with a connection and a session of its own."""
    with tiny_server(tiny_model_dir, tmp_path, "limits.max_sessions=200") as server:

        async def client(number: int) -> int:
            headers = {"X-API-Key": server.key}
            async with httpx.AsyncClient(
                base_url=f"{server.url}/api/v1", headers=headers, timeout=90
            ) as http:

                async def post(path: str, body: Any) -> Any:
                    response = await http.post(path, json=body)
                    assert response.status_code == 200, response.text
                    return response

                session = (await post("/create_session", {})).json()["session_id"]
                wish = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
                made = (await post("/create_sampling_session", wish)).json()
                sample = sample_body(made["sampling_session_id"], 1, max_tokens=3, stop=[])
                future = (await post("/asample", sample)).json()
                found = await post("/retrieve_future", {"request_id": future["request_id"]})
                answer = pb.SampleResponse.FromString(found.content)
                return len(answer.sequences[0].tokens) // 4

        assert await asyncio.gather(*(client(n) for n in range(200))) == [3] * 200


@pytest.mark.timeout(300)
def test_one_data_folder_one_server(tmp_path: Path, tiny_model_dir: Path) -> None:
    with tiny_server(tiny_model_dir, tmp_path):
        second = Server(tiny_model_dir, tmp_path)
        try:
            assert second.wait() == 2
            assert "in use by another server" in second.output()
        finally:
            second.kill()


def test_wrong_arguments_end_with_the_configurations_exit_code(tmp_path: Path) -> None:
    from astuner.cli import main

    assert main(["serve", "--conf", str(tmp_path / "none.yaml")]) == 2
    assert (
        main(["serve", "--model", str(tmp_path / "none"), f"data_dir={tmp_path / 'd'}", "port=0"])
        == 5
    )
    assert os.path.isdir(tmp_path / "d")
