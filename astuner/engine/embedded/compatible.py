"""Which models the packed attention plans can run, and in which dtype they are fast.

The plans compute plain causal attention: models that need more (short sliding
windows, capped attention logits, attention sinks, recurrent layers) are refused
here with the reason, instead of training on something slightly wrong. Loads nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from astuner.errors import ModelError

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def choose_device(name: str) -> torch.device:
    """ "auto" takes CUDA, then MPS, then the CPU. Raises ModelError if it is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu"
    there = {"cuda": torch.cuda.is_available(), "mps": _has_mps(), "cpu": True}
    if not there.get(name.split(":")[0], False):
        raise ModelError(
            f"model.device is {name!r}, but this machine's torch ({torch.__version__}) has no "
            f'such device. Use "auto" or "cpu", or install a torch built for it.'
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the device computes in it fast, else float32."""
    if name != "auto":
        if name not in DTYPES:
            raise ModelError(f'model.dtype is {name!r}; use "auto" or one of {list(DTYPES)}.')
        return DTYPES[name]
    fast = {"cuda": _cuda_has_bf16, "cpu": _cpu_has_bf16}.get(device.type, lambda: False)
    return torch.bfloat16 if fast() else torch.float32


def check_config(config: Any, path: Path) -> None:
    """Raise ModelError if the model's attention is not plain causal attention."""
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        raise _refusal(path, "its config names no context length (max_position_embeddings)")
    if reason := _unsupported_layers(config, context):
        raise _refusal(path, reason)


def context_length(config: Any) -> int:
    """Tokens of the longest sequence. LongRoPE (Ding et al. 2024, arXiv 2402.13753) takes
    other frequencies for a whole pass that goes beyond the original context; a packed row
    holds many sequences, so that none may."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) == "longrope":
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(config, "original_max_position_embeddings", None)
        return min(original or config.max_position_embeddings, config.max_position_embeddings)
    return config.max_position_embeddings


def check_model(model: nn.Module, path: Path) -> None:
    """What only the built model tells: attention that goes its own way, and sinks."""
    reason = ""
    if not getattr(model, "_supports_attention_backend", False):
        reason = f"{type(model).__name__} does not use transformers' attention interface"
    elif any(name.endswith("sinks") for name, _ in model.named_parameters()):
        reason = "it has attention sinks"
    if reason:
        raise _refusal(path, reason)


def _refusal(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"The embedded engine cannot run the model in {path}: {reason}. Use a model with plain "
        "causal attention (Llama, Qwen2.5, Qwen3, SmolLM2, ...), or another backbone."
    )


def _unsupported_layers(config: Any, context: int) -> str:
    if getattr(config, "attn_logit_softcapping", None):
        return f"it caps attention logits (attn_logit_softcapping={config.attn_logit_softcapping})"
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    chunk = getattr(config, "attention_chunk_size", None)
    default = "sliding_attention" if window else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [default])
    for kind, reach in (("sliding_attention", window), ("chunked_attention", chunk)):
        if kind in kinds and reach and reach < context:
            return f"it has {kind} over {reach} tokens, fewer than its context of {context}"
    others = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    return f"it has layers of type {sorted(others)}" if others else ""


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _cuda_has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bf16() -> bool:
    """Native bf16 products (AVX-512 BF16, AMX, Armv8.6); without them bf16 is slower
    than float32. Linux only: elsewhere the safe answer is no."""
    if platform.system() != "Linux":
        return False
    info = Path("/proc/cpuinfo").read_text()
    flags = next((x for x in info.splitlines() if x.lower().startswith(("flags", "features"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))
