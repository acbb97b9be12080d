"""From verl's sharded checkpoint to one plain transformers folder.

verl's own merger rounds everything to bfloat16 and leaves a LoRA beside its base; here
the shards are joined as they are, a LoRA is multiplied into its base in float32, and
the result is rounded once, to the base model's own dtype. Reads FSDP checkpoints
(`model_world_size_N_rank_I.pt`); needs torch, not verl.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from astuner.backbone.report import MODEL, verl_checkpoint
from astuner.config.load import load_config
from astuner.engine.embedded.checkpoint import whole_files
from astuner.engine.embedded.export import copy_but_weights
from astuner.engine.model_source import resolve_model
from astuner.errors import CheckpointError

LORA_META = "lora_train_meta.json"
PEFT_PREFIX = "base_model.model."


def merge_run(run_dir: Path) -> Path:
    """Write the newest checkpoint of a run into `run_dir/model`, in place of what is there.

    Raises CheckpointError when there is none, or it cannot be read or written.
    """
    config = load_config(run_dir / "config.yaml").config
    return merge_newest(run_dir, resolve_model(config.model.path))


def merge_newest(run_dir: Path, base: Path) -> Path:
    """The same, with the base model's folder known."""
    checkpoint = verl_checkpoint(run_dir)
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} has no finished checkpoint of verl.")
    forget_model(run_dir)
    return merge(checkpoint / "actor", base, run_dir / MODEL)


def forget_model(run_dir: Path) -> None:
    """Delete the merged model of an earlier checkpoint."""
    shutil.rmtree(run_dir / MODEL, ignore_errors=True)


def merge(shards: Path, base: Path, to: Path) -> Path:
    """Join the shards in `shards`, for the architecture of the model folder `base`.

    Raises CheckpointError when the shards are incomplete or do not fit.
    """
    model = _empty(base)
    dtype = next(model.parameters()).dtype
    try:
        whole = plain_names(joined(_load(shards)), _lora_scale(shards))
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
        raise CheckpointError(
            f"The checkpoint {shards} cannot be read: {error}. Resume from an earlier one."
        ) from error
    _fill(model, {name: value.to(dtype) for name, value in whole.items()}, shards)
    with whole_files(to) as scratch, _quiet():
        model.save_pretrained(scratch)
        # The base's own config is readable by more versions than one written anew.
        (scratch / "config.json").unlink()
        copy_but_weights(base, scratch)
    return to


def _empty(base: Path) -> Any:
    """The model without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(base, local_files_only=True)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)


def _fill(model: Any, whole: Mapping[str, Any], shards: Path) -> None:
    try:
        unknown = model.load_state_dict(whole, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:  # shapes
        raise CheckpointError(f"{_unfit(shards)} {error}") from error
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing or unknown:
        raise CheckpointError(f"{_unfit(shards)} Missing {missing[:3]}, unknown {unknown[:3]}.")


def _unfit(shards: Path) -> str:
    return f"The checkpoint {shards} does not fit the base model; was model.path changed?"


# ---------------------------------------------------------------- shards


def _load(folder: Path) -> list[Mapping[str, Any]]:
    """The state of each rank, in their order; memory-mapped."""
    import torch

    world = int(json.loads((folder / "fsdp_config.json").read_text())["world_size"])
    files = [folder / f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world)]
    # verl pickles distributed tensors, which the weights-only reader refuses.
    with _quiet():
        return [torch.load(f, map_location="cpu", weights_only=False, mmap=True) for f in files]


@contextmanager
def _quiet() -> Generator[None]:
    """Without progress bars, and torch's warning that reading a mesh makes no process groups."""
    from transformers.utils import logging as bars

    log = logging.getLogger("torch.distributed.device_mesh")
    level, shown = log.level, bars.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(level)
        if shown:
            bars.enable_progress_bar()


def joined(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Name -> the whole tensor, from what each rank holds of it."""
    return {name: _join([rank[name] for rank in ranks]) for name in ranks[0]}


def _join(parts: Sequence[Any]) -> Any:
    """A distributed tensor is put together along the dimension it was cut at; of a mesh with
    replicas (its outer dimension) the first one is taken. A plain tensor is on every rank."""
    import torch

    first = parts[0]
    if not hasattr(first, "placements"):
        return first
    placement = first.placements[-1]
    if placement.is_replicate():
        return first.to_local()
    number = first.device_mesh.mesh.shape[-1]
    return torch.cat([part.to_local() for part in parts[:number]], dim=placement.dim)


def _lora_scale(shards: Path) -> float:
    """alpha / rank (Hu et al. 2021, section 4.1); 0 where no LoRA was trained."""
    meta = shards / LORA_META
    if not meta.is_file():
        return 0.0
    lora = json.loads(meta.read_text())
    return float(lora["lora_alpha"]) / float(lora["r"])


def plain_names(state: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The names of the model itself: without PEFT's wrapping, with W + scale B A in place of
    the three."""
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        stem = name.removesuffix(".base_layer.weight")
        if f"{stem}.lora_A.default.weight" in state:
            a, b = (state[f"{stem}.lora_{part}.default.weight"].float() for part in "AB")
            value = value.float() + scale * (b @ a)
        plain[name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")] = value
    return plain
