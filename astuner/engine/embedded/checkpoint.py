"""What a Policy writes and reads: the weights, and all that a resume needs.

    adapter_config.json, adapter_model.safetensors    LoRA: PEFT's format, fp32 masters
    config.json, model.safetensors, ...               full weights: a transformers folder
    optimizer.safetensors                             moments, step, masters, version

Files are written in a scratch folder beside their place and moved when whole.
Which checkpoint is the newest, and that a folder appears at once or not at all, is
the trainer's business.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from astuner.engine.embedded.masters import Masters
from astuner.engine.embedded.peft_format import ADAPTER, peft_name
from astuner.engine.embedded.weights import Weights
from astuner.errors import CheckpointError

OPTIMIZER = "optimizer.safetensors"
_FAILURES = (OSError, SafetensorError)


def save(path: Path, weights: Weights, masters: Masters, *, optimizer: bool) -> None:
    """Write into the folder `path`. Raises CheckpointError when that fails."""
    with whole_files(path) as scratch:
        weights.states.save(scratch, masters.values())
        if optimizer:
            state = {f"moment.{name}": value for name, value in masters.moments().items()}
            if weights.lora is None:  # else the adapter's file holds them
                state |= {f"master.{name}": value for name, value in masters.values().items()}
            save_file(
                {name: value.contiguous().cpu() for name, value in state.items()},
                scratch / OPTIMIZER,
                metadata={"version": str(weights.version)},
            )


def load(path: Path, weights: Weights, masters: Masters, *, optimizer: bool) -> None:
    """Read what `save` wrote. Raises CheckpointError when it does not fit."""
    state: dict[str, Tensor] = {}
    version = weights.version + 1
    try:
        if optimizer:
            state, version = load_file(path / OPTIMIZER), _saved_version(path / OPTIMIZER)
        values = _saved_values(path, weights, masters, state)
    except _FAILURES as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {error}. Resume from an earlier one, or "
            "start without --resume."
        ) from error
    masters.set_values(values)
    masters.set_moments(_named(state, "moment."))
    weights.version = version


def _saved_values(
    path: Path, weights: Weights, masters: Masters, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The masters by the names of the parameters, checked against those in memory."""
    expected = masters.values()
    if weights.lora is not None:
        file = load_file(path / ADAPTER)
        values = {n: file[peft_name(n)] for n in expected if peft_name(n) in file}
    else:
        values = _named(state, "master.") or _all_tensors(path)
    for name, master in expected.items():
        seen = tuple(values[name].shape) if name in values else "nothing"
        if seen != tuple(master.shape):
            raise CheckpointError(
                f"The checkpoint {path} does not fit the model: {name} should be "
                f"{tuple(master.shape)}, but it holds {seen}. It was written with another base "
                "model or other model.lora settings; use those, or start a new run."
            )
    return values


def _named(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def _all_tensors(path: Path) -> dict[str, Tensor]:
    """The shards of a transformers folder."""
    return {n: v for f in sorted(path.glob("model*.safetensors")) for n, v in load_file(f).items()}


def _saved_version(file: Path) -> int:
    with safe_open(file, "pt") as opened:
        return int((opened.metadata() or {}).get("version", 0))


@contextmanager
def whole_files(path: Path) -> Generator[Path]:
    """A scratch folder whose files are moved into `path` at the end, or all dropped.

    Raises CheckpointError when one of them cannot be written, e.g. on a full disk.
    """
    scratch = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=path, prefix=".writing-"))
        yield scratch
        for file in sorted(scratch.iterdir()):
            file.replace(path / file.name)
    except _FAILURES as error:
        raise CheckpointError(
            f"{path} could not be written: {error}. {_room(path)} Make room there, or choose "
            "another place; checkpoints written before are whole."
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _room(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path).free / 1e6:.0f} MB are free there."
    except OSError:
        return ""
