"""astuner's own service as a child of the launcher, for one run: what samples and trains where
Trinity's own engines are not used.

On the loopback address at a free port, with one key that only this run has, its data in the
run's folder (so that a resumed run finds its checkpoints), below a guard: it ends with the
launcher, however that ends.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from astuner.backbone.assembly import max_context
from astuner.backbone.spawned.last_words import last_words
from astuner.backbone.spawned.supervise import Child
from astuner.config.schema import AstunerConfig
from astuner.errors import BackboneError

FOLDER, DATA, LOG = "service", "data", "service.log"
TENANT = "run"
START_SECONDS = 900.0
POLL_SECONDS = 0.1
COMMAND = (sys.executable, "-m", "astuner.cli", "serve", "--conf")
_LISTENS = re.compile(r"^Serving .* at (http://\S+) for ", re.MULTILINE)


@dataclass
class RunningService:
    """A service that listens. Close it."""

    url: str
    key: str
    child: Child

    def close(self) -> None:
        self.child.close()


def service_config(config: AstunerConfig, model: Path, folder: Path, key: str) -> dict[str, Any]:
    """The service's own configuration: what is the run's affair, the rest as it is."""
    return {
        "model": {
            "path": str(model),
            "name": str(model),
            "device": config.model.device,
            "dtype": config.model.dtype,
            "max_model_len": max_context(config),
            "lora_alpha": config.model.lora.alpha,
            "micro_batch_tokens": config.trainer_common.micro_batch_tokens,
            "gradient_checkpointing": config.trainer_common.gradient_checkpointing,
            "kv_cache_tokens": config.rollout.kv_cache_tokens,
        },
        "host": "127.0.0.1",
        "port": 0,
        "keys": {TENANT: key},
        "data_dir": str(folder / DATA),
        "persistence": "file",
        "limits": {"max_running_samples": config.rollout.max_num_seqs},
    }


async def start_service(config: AstunerConfig, model: Path, trinity_folder: Path) -> RunningService:
    """Start it, and wait until it listens. Raises BackboneError when it does not."""
    folder = trinity_folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    key = f"tml-{secrets.token_urlsafe(24)}"
    conf, log = folder / "service.yaml", folder / LOG
    _write_private(conf, yaml.safe_dump({"service": service_config(config, model, folder, key)}))
    log.unlink(missing_ok=True)
    child = Child([*COMMAND, str(conf)], folder, {"PYTHONUNBUFFERED": "1"}, log=LOG)
    try:
        return RunningService(await _url(child, log), key, child)
    except BaseException:
        child.close()
        raise


async def _url(child: Child, log: Path) -> str:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if found := _LISTENS.search(log.read_text(errors="replace") if log.exists() else ""):
            return found[1]
        if (code := child.ended()) is not None:
            raise BackboneError(
                f"astuner's service for this run ended while starting, exit code {code}:\n"
                f"{last_words(log)}\nEverything it printed: {log}."
            )
        await asyncio.sleep(POLL_SECONDS)
    raise BackboneError(
        f"astuner's service for this run did not listen within {START_SECONDS:.0f} s. "
        f"What it printed: {log}."
    )


def _write_private(path: Path, text: str) -> None:
    """Its key is nobody else's."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
