"""Adapters as PEFT writes and reads them: `adapter_config.json` and one safetensors file.

Only plain LoRA with one rank: what PEFT can do beyond it (DoRA, biases, ranks by
layer, ...) is refused with its name. Reading gives tensors and a shape; it makes no adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from astuner.engine.embedded.adapters import AdapterShape, LoraLayers, Target, name_of_a, name_of_b
from astuner.errors import CheckpointError

ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_BEYOND_PLAIN = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")


def peft_name(name: str) -> str:
    """A parameter's name in a PEFT file."""
    return _PREFIX + name


def write_adapter(
    folder: Path, shape: AdapterShape, values: Mapping[str, Tensor], *, base: Path, transposed: bool
) -> None:
    """Write `values`, by the names of the adapter's parameters, and their description."""
    from peft import LoraConfig

    config: Any = LoraConfig(
        r=shape.rank,
        lora_alpha=int(shape.alpha) if shape.alpha == int(shape.alpha) else shape.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=sorted({target.name.rsplit(".", 1)[-1] for target in shape.targets}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(
        {peft_name(name): value.contiguous().cpu() for name, value in values.items()},
        folder / ADAPTER,
        metadata={"format": "pt"},
    )


def read_adapter(folder: Path, layers: LoraLayers) -> tuple[AdapterShape, dict[str, Tensor]]:
    """The shape of the adapter in `folder`, and its matrices by the names of an adapter's
    parameters. Raises CheckpointError when it is no plain LoRA of this model."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        file = load_file(folder / ADAPTER)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no adapter that can be read: {error}") from error
    beyond = [key for key in _BEYOND_PLAIN if config.get(key)]
    if config.get("peft_type") != "LORA" or beyond:
        kind = beyond or [config.get("peft_type")]
        raise CheckpointError(f"{folder} is not a plain LoRA adapter: {', '.join(map(str, kind))}.")
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)
    return _fitted(folder, layers, rank, alpha, file)


def _fitted(
    folder: Path, layers: LoraLayers, rank: int, alpha: float, file: Mapping[str, Tensor]
) -> tuple[AdapterShape, dict[str, Tensor]]:
    values = {name.removeprefix(_PREFIX): value for name, value in file.items()}
    names = {name.split(".lora_A.")[0] for name in values if ".lora_A." in name}
    shape = layers.shape_of(rank, alpha, sorted(names))
    expected = {n: v for t in shape.targets for n, v in _matrix_sizes(t, rank).items()}
    seen = {name: tuple(value.shape) for name, value in values.items()}
    if seen != expected or not expected:
        wrong = sorted(seen.items() ^ expected.items())
        raise CheckpointError(
            f"The adapter in {folder} does not fit the model: "
            f"{wrong[0] if wrong else 'it is empty'}. It was made for another base model."
        )
    return shape, values


def _matrix_sizes(target: Target, rank: int) -> dict[str, tuple[int, ...]]:
    return {
        name_of_a(target.name): (rank, target.inputs),
        name_of_b(target.name): (target.outputs, rank),
    }
