"""Reading LoRA files: the spellings of diffusers, PEFT and kohya, as one list of low-rank updates."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy.bundle.files import sha256_file
from dipgo_deploy.bundle.safetensors_file import read_tensors
from dipgo_deploy.errors import UserError

# What a key says about its module: the low-rank pair, its alpha, or something that is not plain LoRA.
_DOWN = re.compile(r"(?:\.lora_linear_layer|\.lora)?\.(?:lora_A(?:\.\w+)?|lora_down|down)\.weight$")
_UP = re.compile(r"(?:\.lora_linear_layer|\.lora)?\.(?:lora_B(?:\.\w+)?|lora_up|up)\.weight$")
_ALPHA = re.compile(r"\.alpha$")
_OTHER_KINDS = {
    "DoRA": re.compile(r"\.(lora_magnitude_vector(\.\w+)?(\.weight)?|dora_scale)$"),
    "LoHa": re.compile(r"\.hada_\w+$"),
    "LoKr": re.compile(r"\.lokr_\w+$"),
    "LoCon with a middle matrix": re.compile(r"\.lora_mid\.weight$"),
    "LoRA with biases": re.compile(r"\.lora_B(\.\w+)?\.bias$"),
}
# diffusers' attention processors: `attn1.processor.to_out_lora` is the update of `attn1.to_out.0`.
_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora$")
_PEFT_PREFIX = "base_model.model."
_PREFIXES = {  # longest first where one is another's beginning
    "denoiser": ("unet.", "transformer.", "lora_unet_", "lora_transformer_"),
    "text_encoder": ("text_encoder.", "lora_te1_", "lora_te_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
    "text_encoder_3": ("text_encoder_3.", "lora_te3_"),
}
_ADAPTER_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class LowRank:
    """One update: W + scale * factor * up @ down.

    component: ``denoiser``, ``text_encoder``, ``text_encoder_2`` or ``text_encoder_3``. module: dotted path as the file
    has it; kohya's has underscores instead of dots. down: float32 (rank, in[, kh, kw]). up: float32
    (out, rank[, 1, 1]). factor: alpha / rank.
    """

    component: str
    module: str
    flat: bool
    down: np.ndarray
    up: np.ndarray
    factor: float


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file: its sha256 and updates. ``ignored``: keys that are neither an update nor an alpha."""

    path: Path
    sha256: str
    updates: tuple[LowRank, ...]
    ignored: tuple[str, ...]


def parse_choice(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:SCALE`` as (file, scale); the scale is 1 where none is given.

    Raises:
        UserError: what follows the last colon is not a finite number, and no such file exists.
    """
    name, colon, scale = text.rpartition(":")
    if not colon or Path(text).is_file():
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        raise UserError(f"--lora {text}: no such file, and {scale!r} is no scale; give FILE or FILE:SCALE") from None
    return Path(name), check_scale(value)


def check_scale(scale: float) -> float:
    """The scale, if it is a finite number; otherwise a UserError."""
    if not math.isfinite(scale):
        raise UserError(f"--lora: scale {scale}: give a finite number, such as 0.8")
    return float(scale)


def read_lora(path: Path) -> LoraFile:
    """Read a safetensors file of LoRA weights; nothing in it is executed.

    Raises:
        UserError: no such file, not safetensors, another kind of adapter, an unpaired or misshapen matrix, values that
            are not finite, or no LoRA in it.
    """
    tensors, metadata = _tensors(path)
    for key in tensors:
        for kind, pattern in _OTHER_KINDS.items():
            if pattern.search(key):
                raise UserError(f"{path}: {key}: {kind} is not supported, only LoRA; merge it into the model instead")
    downs: dict[str, np.ndarray] = {}
    ups: dict[str, np.ndarray] = {}
    alphas: dict[str, np.ndarray] = {}
    ignored = []
    for key, tensor in tensors.items():
        for pattern, found in ((_DOWN, downs), (_UP, ups), (_ALPHA, alphas)):
            match = pattern.search(key)
            if match is not None:
                found[key[: match.start()]] = tensor
                break
        else:
            ignored.append(key)
    unpaired = sorted(downs.keys() ^ ups.keys())
    if unpaired:
        raise UserError(f"{path}: {unpaired[0]}: only one of its two matrices is there; the file is not whole")
    if not downs:
        raise UserError(f"{path}: no LoRA weights in it (first key: {next(iter(tensors), 'none')}); give a LoRA file")
    configs = _configs(path, metadata, downs)
    updates = tuple(_update(path, module, downs[module], ups[module], alphas, configs) for module in downs)
    return LoraFile(path, sha256_file(path), updates, tuple(ignored))


def _update(
    path: Path,
    key: str,
    down: np.ndarray,
    up: np.ndarray,
    alphas: Mapping[str, np.ndarray],
    configs: Mapping[str, Mapping[str, Any]],
) -> LowRank:
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.shape[2:] not in ((), (1, 1)):
        raise UserError(f"{path}: {key}: shapes {down.shape} and {up.shape} are of no linear or 2-d convolution layer")
    rank = down.shape[0]
    if rank == 0 or up.shape[1] != rank:
        raise UserError(f"{path}: {key}: its matrices have ranks {rank} and {up.shape[1]}; the file is not whole")
    if not (np.isfinite(down).all() and np.isfinite(up).all()):
        raise UserError(f"{path}: {key}: holds NaN or infinity; train or download it again")
    component, module, flat = _place(key)
    config = configs.get(component, {})
    factor = float(alphas[key].reshape(-1)[0]) / rank if key in alphas else _factor(config, module, rank)
    if not math.isfinite(factor):
        raise UserError(f"{path}: {key}: its alpha is not a finite number; train or download it again")
    return LowRank(component, module, flat, down, up, factor)


def _place(key: str) -> tuple[str, str, bool]:
    """Component, module path, and whether the path has underscores for dots."""
    key = key.removeprefix(_PEFT_PREFIX)
    for component, prefixes in _PREFIXES.items():
        for prefix in prefixes:
            if key.startswith(prefix):
                module = key.removeprefix(prefix)
                return component, _processor_module(module), prefix.endswith("_")
    return "denoiser", _processor_module(key), False


def _processor_module(module: str) -> str:
    return _PROCESSOR.sub(lambda match: ".to_out.0" if match[1] == "out" else f".to_{match[1]}", module)


def _factor(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank of PEFT's configuration; 1 where there is none (alpha is the rank, as diffusers takes it)."""
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?{pattern}", module):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _configs(path: Path, metadata: Mapping[str, str], modules: Iterable[str]) -> dict[str, dict[str, Any]]:
    """PEFT's configuration of each component: in the file's metadata, or in the file that PEFT writes beside it."""
    beside = path.with_name(_ADAPTER_CONFIG)
    try:
        if any(module.startswith(_PEFT_PREFIX) for module in modules) and beside.is_file():
            return {"denoiser": dict(json.loads(beside.read_bytes()))}
        flat = dict(json.loads(metadata.get(_METADATA, "{}")))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path}: its PEFT configuration is not JSON ({error}); correct or remove it") from None
    found: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        component, field, _ = _place(name)
        found.setdefault(component, {})[field] = value
    return found


def _tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors as float32, and the file's metadata."""
    import safetensors

    if not path.is_file():
        raise UserError(f"--lora {path}: no such file")
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
        return {name: tensor.astype(np.float32) for name, tensor in read_tensors(path).items()}, metadata
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({error}); LoRA files of other formats are not read") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; not a LoRA file") from None
