"""Weights that somebody has quantised, told by configuration, file or tensors, so that they are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError

# What the weights' methods call what they store beside or in place of a weight: part of a tensor's name -> method.
_NAMES = (
    (".quant_state.bitsandbytes__", "bitsandbytes, 4 bits"),
    (".absmax", "bitsandbytes, 4 bits"),
    (".SCB", "bitsandbytes, 8 bits"),
    (".comfy_quant", "ComfyUI"),
    ("scaled_fp8", "ComfyUI, scaled fp8"),
    (".scale_weight", "ComfyUI, scaled fp8"),
    (".weight_scale", "scaled fp8"),
    (".wscales", "SVDQuant"),
    (".qweight", "packed integers"),
    (":qdata", "torchao"),
    ("_qdata", "torchao"),
    ("._data", "quanto"),
)
# Types that nobody trains in.
_TYPES = ("F8_", "F4", "F6_", "I8", "U8")
_GGUF = b"GGUF"
_ADVICE = "give the model's own files, of 16 bits or more"


def refuse_quantised_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse (UserError) a part whose ``config.json`` says that its weights are quantised. path: of that file."""
    settings = config.get("quantization_config")
    if settings:
        named = settings if isinstance(settings, Mapping) else {}
        method = named.get("quant_method") or named.get("quant_type") or "quantization_config"
        raise UserError(f"{path}: says that its weights are quantised ({method}); {_ADVICE}")


def refuse_quantised_weights(path: Path, types: Mapping[str, str]) -> None:
    """Refuse (UserError) a safetensors file with quantised tensors. types: tensor name -> type as the file has it."""
    for part, method in _NAMES:
        if found := next((name for name in types if part in name), None):
            raise UserError(f"{path}: its weights are quantised ({method}: {found}); {_ADVICE}")
    for name, kind in types.items():
        if kind.startswith(_TYPES) and name.endswith("weight"):
            raise UserError(f"{path}: its weights are quantised ({name} is {kind}); {_ADVICE}")


def is_gguf(path: Path) -> bool:
    """Whether a file is in llama.cpp's format. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(_GGUF)) == _GGUF


def gguf_refused(path: Path) -> UserError:
    """The refusal of such a file."""
    return UserError(f"{path}: its weights are quantised (GGUF); {_ADVICE}")
