"""The run's own service: how it is configured, and that it listens or says why not."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
import yaml

from astuner.backbone.trinity import service_child
from astuner.backbone.trinity.service_child import service_config, start_service
from astuner.config.schema import AstunerConfig
from astuner.config.service import load_service_config
from astuner.errors import BackboneError

LISTENS = """
import time
print("Loading /m ...", flush=True)
print("Serving /m at http://127.0.0.1:4321 for run.", flush=True)
time.sleep(600)
"""
FAILS = "raise SystemExit('no such model')"


def command(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(service_child, "COMMAND", (sys.executable, "-c", code))


def test_the_services_configuration_is_the_runs(tmp_path: Path) -> None:
    config = AstunerConfig()
    config.model.lora.alpha = 8
    config.data.max_prompt_length, config.data.max_response_length = 100, 28
    path = tmp_path / "service.yaml"
    made = service_config(config, Path("/m/tiny"), tmp_path, "tml-1234567890abcdef")
    path.write_text(yaml.safe_dump({"service": made}))
    loaded = load_service_config(path)
    assert (loaded.model.path, loaded.model.name) == ("/m/tiny", "/m/tiny")
    assert (loaded.model.lora_alpha, loaded.model.max_model_len) == (8, 128)
    assert (loaded.host, loaded.port, loaded.persistence) == ("127.0.0.1", 0, "file")
    assert loaded.data_dir == str(tmp_path / "data")


async def test_it_listens_with_a_key_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(monkeypatch, LISTENS)
    service = await start_service(AstunerConfig(), Path("/m"), tmp_path)
    try:
        assert service.url == "http://127.0.0.1:4321"
        assert service.key.startswith("tml-") and len(service.key) > 30
        conf = tmp_path / "service" / "service.yaml"
        assert stat.S_IMODE(conf.stat().st_mode) == 0o600
        assert service.key in conf.read_text()
        assert service.child.ended() is None
    finally:
        service.close()
    assert service.child.ended() is not None


async def test_one_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(monkeypatch, FAILS)
    with pytest.raises(BackboneError, match="exit code 1:\nno such model"):
        await start_service(AstunerConfig(), Path("/m"), tmp_path)
