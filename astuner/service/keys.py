"""Where the tenants' keys come from: the configuration, its keys_file, or the data folder.

What a key must look like and whose it is are `tenants`' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from astuner.config.service import ServiceConfig
from astuner.errors import ConfigError
from astuner.service.tenants import DEFAULT_TENANT, Tenants, key_in


@dataclass(frozen=True, slots=True)
class Keys:
    """The tenants, and where their keys are, for telling."""

    tenants: Tenants
    new_key: str = ""
    """One that was made just now, to be shown once."""
    file: Path | None = None


def read_keys(config: ServiceConfig, data_dir: Path) -> Keys:
    """From the configuration, its keys_file, or the data folder. Raises ConfigError."""
    keys = {str(tenant): str(key) for tenant, key in config.keys.items()}
    if config.keys_file:
        keys |= _keys_file(Path(config.keys_file))
    if keys:
        return Keys(Tenants(keys))
    key, file, is_new = key_in(data_dir)
    return Keys(Tenants({DEFAULT_TENANT: key}), key if is_new else "", file)


def _keys_file(path: Path) -> dict[str, str]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"service.keys_file: {path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"service.keys_file: {path} must have lines like `alice: tml-...`.")
    return {str(tenant): str(key) for tenant, key in found.items()}  # pyright: ignore[reportUnknownArgumentType]
