"""The layers of an adapter, as the Tinker API has words for them: whole parts of a model."""

from __future__ import annotations

from collections.abc import Mapping

PARTS: Mapping[str, tuple[str, ...]] = {
    "all-linear": ("attn", "mlp"),
    "attn": ("attn",),
    "mlp": ("mlp",),
    "unembed": ("unembed",),
}
"""What `model.lora.target_modules` may name, and the parts of a model it stands for."""


def lora_parts(target_modules: str) -> dict[str, bool]:
    """The API's switches, e.g. {train_attn: True, ...}. Names that are not in PARTS count
    for nothing (`unknown_parts` tells them)."""
    chosen = {part for name in _names(target_modules) for part in PARTS.get(name, ())}
    return {f"train_{part}": part in chosen for part in ("attn", "mlp", "unembed")}


def unknown_parts(target_modules: str) -> list[str]:
    """Names that the API has no word for."""
    return [name for name in _names(target_modules) if name not in PARTS]


def _names(target_modules: str) -> list[str]:
    return [name.strip() for name in target_modules.split(",")]
