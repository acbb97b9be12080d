"""From a checkpoint to a plain transformers folder, which vLLM loads as well.

A LoRA adapter is multiplied into its base in float32 and rounded once to the base's
own dtype. Tokenizer, template and everything else of the base are copied as they
are. Nothing of a running engine is touched.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from astuner.engine.embedded.checkpoint import ADAPTER, OPTIMIZER, whole_files
from astuner.errors import CheckpointError

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.index.json", "*.h5", "*.msgpack", "*.pth")


def merge(checkpoint: str | Path, base: str | Path, to: str | Path) -> Path:
    """Write `checkpoint` (a folder of Policy.save) merged with the model folder `base`
    into the folder `to`, which must be new or empty; returns it.

    Raises CheckpointError when it is neither, or when something cannot be read or written.
    """
    checkpoint, base, to = Path(checkpoint), Path(base), Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"{to} exists and is not empty. Choose another folder to merge to.")
    if not (checkpoint / ADAPTER).is_file() and not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint: it holds neither {ADAPTER} nor config.json."
        )
    model = _merged(checkpoint, base) if (checkpoint / ADAPTER).is_file() else None
    with whole_files(to) as scratch:
        if model is None:
            _copy(checkpoint, scratch, but=(OPTIMIZER,))
        else:
            model.save_pretrained(scratch)
            # The base's own config is readable by more versions than one written anew.
            (scratch / "config.json").unlink()
        copy_but_weights(base, scratch)
    return to


def copy_but_weights(base: Path, to: Path) -> None:
    """Tokenizer, template, config: all files of a model folder that `to` has not, but weights."""
    _copy(base, to, but=_WEIGHT_FILES)


def _merged(checkpoint: Path, base: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
        dtype = model.dtype
        tuned: Any = PeftModel.from_pretrained(model.to(torch.float32), str(checkpoint))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"The adapter {checkpoint} cannot be merged into {base}: {error}. Give the base model "
            "it was trained on."
        ) from error
    _refuse_if_tied(tuned, checkpoint)
    return tuned.merge_and_unload().to(dtype)


def _refuse_if_tied(tuned: Any, checkpoint: Path) -> None:
    """Merging into an output embedding that is the input embedding too would change both."""
    head = tuned.get_output_embeddings()
    if hasattr(head, "lora_A") and head.weight is tuned.get_input_embeddings().weight:
        raise CheckpointError(
            f"The adapter {checkpoint} changes the output embedding, which in this model is the "
            "input embedding as well: merged, it would be another model. Load base and adapter "
            "with PEFT instead, or train without model.lora.target_modules on the embedding."
        )


def _copy(source: Path, to: Path, *, but: tuple[str, ...]) -> None:
    """The files of a folder, without those that match and those that `to` has already."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(p) for p in but):
            target = to / file.name
            if not target.exists():
                shutil.copyfile(file, target)
