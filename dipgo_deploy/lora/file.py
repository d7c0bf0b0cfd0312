"""Reading LoRA files: every spelling of diffusers, PEFT, kohya, XLabs and ComfyUI as one list of changes.

Only the header and the alphas are read when a file is opened; matrices are read when they are used.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dipgo_deploy.bundle.files import sha256_file
from dipgo_deploy.bundle.safetensors_file import StoredTensor, TensorFile
from dipgo_deploy.errors import UserError
from dipgo_deploy.lora.keys import Layer, Role, kind_of_key, layer_of, split_key, written_by_peft
from dipgo_deploy.lora.peft_config import ADAPTER_CONFIG, PeftConfig, config_beside, configs_within

# What a folder of a LoRA holds, as PEFT and as diffusers write it.
_FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
# Trainers use one rank for all layers, also for those that are smaller.
_ANY_RANK = 256
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class LowRank:
    """One update of a weight: W + scale * factor * up @ down.

    Attributes:
        down: (rank, in[, kh, kw]).
        up: (out, rank[, 1, 1]).
        factor: alpha / rank.
    """

    layer: Layer
    down: StoredTensor
    up: StoredTensor
    factor: float
    parameter: Literal["weight", "bias"] = "weight"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """What it is made of."""
        return self.down, self.up

    @property
    def key(self) -> str:
        """One of its keys in the file."""
        return self.down.name

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """These rows of up @ down: float32 (rows, the product of the other extents)."""
        up, down = (_float32(tensor) for tensor in (self.up, self.down))
        product: np.ndarray = up.reshape(up.shape[0], -1)[rows] @ down.reshape(down.shape[0], -1)
        return product


@dataclass(frozen=True, eq=False)
class Difference:
    """A difference that is added to a weight or bias as it is: W + scale * factor * values."""

    layer: Layer
    values: StoredTensor
    factor: float
    parameter: Literal["weight", "bias"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return self.values.shape

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """What it is made of."""
        return (self.values,)

    @property
    def key(self) -> str:
        """Its key in the file."""
        return self.values.name

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """These rows: float32 (rows, the product of the other extents)."""
        values = _float32(self.values)
        flat: np.ndarray = values.reshape(values.shape[0], -1)[rows]
        return flat


Change = LowRank | Difference


@dataclass(frozen=True, eq=False)
class LoraFile:
    """An open LoRA file.

    sha256: of the file, together with PEFT's configuration beside it where that counts. changes: what is understood.
    others: keys that are not, with their kinds; a layer that has one of them has no changes.
    """

    path: Path
    config: Path | None
    changes: tuple[Change, ...]
    others: tuple[tuple[str, str], ...]

    def sha256(self) -> str:
        """Hash of the file, and of the configuration beside it that decides on its factors."""
        digests = [sha256_file(path) for path in (self.path, self.config) if path is not None]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def check_values(self, change: Change) -> None:
        """Read a change's values once.

        Raises:
            UserError: some are not finite, or the file cannot be read.
        """
        for tensor in change.tensors:
            if not all(np.isfinite(chunk).all() for chunk in self._chunks(tensor)):
                raise UserError(f"{self.path}: {tensor.name}: holds NaN or infinity; train or download it again")

    def is_zero(self, change: Change) -> bool:
        """Whether a change adds nothing.

        Raises:
            UserError: the file cannot be read.
        """
        return any(not any(chunk.any() for chunk in self._chunks(tensor)) for tensor in change.tensors)

    def _chunks(self, tensor: StoredTensor) -> Iterator[np.ndarray]:
        try:
            yield from tensor.chunks()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from None


class LoraChoice(NamedTuple):
    """A LoRA to apply: a file or folder, its scale, whether what does not fit is left out (else refused), and which of
    a model's denoisers it is for (the first one where none is named)."""

    file: Path
    scale: float = 1.0
    partial: bool = False
    denoiser: str = ""


Given = tuple[Path, float] | tuple[Path, float, str]
"""File and scale of a LoRA, and the denoiser that it is for where one is named."""


def parse_choice(text: str) -> tuple[Path, float, str]:
    """``FILE``, ``FILE:SCALE`` or ``DENOISER=FILE:SCALE`` as (file, scale, denoiser); the scale is 1 where none is
    given, the denoiser empty.

    Raises:
        UserError: what follows the last colon is not a finite number, and no such file or folder exists.
    """
    denoiser, equals, rest = text.partition("=")
    if equals and denoiser.isidentifier() and not Path(text).exists():
        return (*parse_choice(rest)[:2], denoiser)
    name, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0, ""
    try:
        value = float(scale)
    except ValueError:
        raise UserError(f"--lora {text}: no such file, and {scale!r} is no scale; give FILE or FILE:SCALE") from None
    return Path(name), check_scale(value), ""


def check_scale(scale: float) -> float:
    """The scale, if it is a number that float32 can hold; otherwise a UserError."""
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number):
        raise UserError(f"--lora: scale {ascii(scale)[:40]}; give a number, such as 0.8")
    if not abs(float(scale)) <= _LARGEST:
        raise UserError(f"--lora: scale {scale:g}; give a finite number, such as 0.8")
    return float(scale)


def read_lora(path: Path) -> LoraFile:
    """Open a safetensors file of LoRA weights, or a folder that holds one; nothing in it is executed.

    Raises:
        UserError: no such file, not safetensors, an unpaired or misshapen matrix, a configuration that does not fit,
            or no LoRA in it.
    """
    path = _file(path)
    try:
        file = TensorFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; LoRA files of other formats are not read") from None
    layers, others = _layers(file)
    config = config_beside(path) if any(map(written_by_peft, file.tensors)) else None
    within = configs_within(str(path), file.metadata)
    changes: list[Change] = []
    for name, parts in layers.items():
        layer = layer_of(name)
        own = config if written_by_peft(name) else within.get(layer.components[0])
        changes.extend(_changes(path, name, layer, parts, own))
    if not changes and not others:
        raise UserError(f"{path}: no LoRA weights in it; give a LoRA file")
    return LoraFile(path, path.with_name(ADAPTER_CONFIG) if config is not None else None, tuple(changes), others)


def _file(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"--lora {path}: neither {' nor '.join(_FOLDER_FILES)} in this folder; give a file")
        return found
    if not path.is_file():
        raise UserError(f"--lora {path}: no such file" + (", not a regular one" if path.exists() else ""))
    return path


def _layers(file: TensorFile) -> tuple[dict[str, dict[Role, StoredTensor]], tuple[tuple[str, str], ...]]:
    """The parts of each layer, and the keys that are not understood with their kinds; their layers are left out."""
    layers: dict[str, dict[Role, StoredTensor]] = defaultdict(dict)
    others: dict[str, list[str]] = defaultdict(list)
    for key, tensor in file.tensors.items():
        name, role = split_key(key)
        if role is None:
            others[name].append(key)
        elif role in layers[name]:
            raise UserError(f"{file.path}: {key}: another key of this layer says the same; leave one of them out")
        else:
            layers[name][role] = tensor
    for name in [name for name, parts in layers.items() if parts.keys() == {"alpha"}]:
        others[name].append(f"{name}.alpha")
    for name in others:
        layers.pop(name, None)
    return layers, tuple((key, kind_of_key(key)) for keys in others.values() for key in keys)


def _changes(
    path: Path, name: str, layer: Layer, parts: Mapping[Role, StoredTensor], config: PeftConfig | None
) -> list[Change]:
    for tensor in parts.values():
        if not tensor.is_float and tensor is not parts.get("alpha"):
            raise UserError(f"{path}: {tensor.name} has type {tensor.dtype}; a LoRA has floating-point ones")
    changes: list[Change] = []
    for role in ("weight", "bias"):
        if role in parts:
            if not parts[role].items:
                raise UserError(f"{path}: {parts[role].name}: is empty; the file is not whole")
            changes.append(Difference(layer, parts[role], 1.0, role))
    if ("down" in parts) != ("up" in parts) or ("up_bias" in parts and "up" not in parts):
        raise UserError(f"{path}: {name}: only one of its two matrices is there; the file is not whole")
    if "up" in parts:
        down, up = parts["down"], parts["up"]
        factor = _factor(path, name, layer, _rank(path, name, down, up), parts.get("alpha"), config)
        changes.append(LowRank(layer, down, up, factor))
        if "up_bias" in parts:
            changes.append(Difference(layer, parts["up_bias"], factor, "bias"))
    return changes


def _rank(path: Path, name: str, down: StoredTensor, up: StoredTensor) -> int:
    """The rank of two matrices, if they are of a layer."""
    if len(down.shape) not in (2, 4) or len(up.shape) not in (2, 4) or up.shape[2:] not in ((), (1, 1)):
        raise UserError(f"{path}: {name}: shapes {down.shape} and {up.shape} are of no linear or 2-d convolution layer")
    rank = down.shape[0]
    if not down.items or not up.items or up.shape[1] != rank:
        raise UserError(f"{path}: {name}: its matrices have ranks {rank} and {up.shape[1]}; the file is not whole")
    largest = max(_ANY_RANK, up.shape[0], down.items // rank)
    if rank > largest:
        raise UserError(f"{path}: {name}: rank {rank}, where the layer has at most {largest}; it is not a LoRA")
    return rank


def _factor(
    path: Path, name: str, layer: Layer, rank: int, alpha: StoredTensor | None, config: PeftConfig | None
) -> float:
    """alpha / rank; 1 where the file does not say (alpha is the rank, as diffusers takes it)."""
    configured = None if config is None else config.factor(layer.module, rank)
    if alpha is None:
        return 1.0 if configured is None else configured
    if alpha.items != 1:
        raise UserError(f"{path}: {alpha.name}: an alpha is one number; train or download it again")
    try:
        factor = float(alpha.read().reshape(-1)[0]) / rank
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; not a LoRA file") from None
    if not math.isfinite(factor):
        raise UserError(f"{path}: {alpha.name}: is not a finite number; train or download it again")
    if configured is not None and not math.isclose(factor, configured, rel_tol=1e-5):
        raise UserError(
            f"{path}: {name}: its alpha gives a factor of {factor:g}, PEFT's configuration one of {configured:g};"
            " correct or remove one of them"
        )
    return factor


def _float32(tensor: StoredTensor) -> np.ndarray:
    try:
        return tensor.read().astype(np.float32)
    except OSError as error:
        raise UserError(f"{tensor.file.path}: cannot be read ({error})") from None
