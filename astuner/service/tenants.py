"""Who is calling: keys and the tenants they stand for.

Keys come from the configuration or, when it has none, from a file in the data folder that
is made on the first start. They start with "tml-", or the SDK refuses them. Comparison
takes the same time for every wrong key; keys appear in no message and no record.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from astuner.errors import ConfigError, RequestError

PREFIX = "tml-"
DEFAULT_TENANT = "default"
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Tenants:
    """Every tenant and their key."""

    keys: Mapping[str, str]
    """Tenant -> key."""

    def __post_init__(self) -> None:
        for tenant, key in self.keys.items():
            if not _TENANT.fullmatch(tenant):
                raise ConfigError(
                    f"service.keys: {tenant!r} cannot name a tenant; use letters, digits, '_' "
                    "and '-'."
                )
            if not key.startswith(PREFIX) or len(key) < 12 or not key.isascii():
                raise ConfigError(
                    f"service.keys: the key of {tenant!r} must start with {PREFIX!r} (the SDK "
                    "refuses others) and have at least 12 characters."
                )
        if len(set(self.keys.values())) != len(self.keys):
            raise ConfigError("service.keys: two tenants have the same key.")

    def find(self, key: str | None) -> str:
        """Whose key this is. Raises RequestError (401)."""
        found = ""
        for tenant, known in self.keys.items():
            if hmac.compare_digest(known.encode(), (key or "").encode()):
                found = tenant
        if not found:
            why = "The API key is not known here" if key else "The request has no API key"
            raise RequestError(
                f"{why}. Pass api_key=... (or set TINKER_API_KEY) with a key of this service.",
                status=401,
                code="invalid_api_key",
            )
        return found


def new_key() -> str:
    return f"{PREFIX}{secrets.token_urlsafe(24)}"


def key_in(data_dir: Path) -> tuple[str, Path, bool]:
    """The key kept in the data folder, its file, and whether it was made just now."""
    file = data_dir / "api-key"
    try:
        if file.exists():
            return file.read_text().strip(), file, False
        data_dir.mkdir(parents=True, exist_ok=True)
        key = new_key()
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(f"{key}\n")
    except OSError as error:
        raise ConfigError(
            f"service.data_dir: {file} cannot be read or written: {error.strerror}."
        ) from error
    return key, file, True
