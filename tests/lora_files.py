"""LoRA files in every spelling, made from one set of low-rank updates, and the same updates merged by torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from dipgo_deploy.runtime.pipeline import Pipeline

RANK = 3


@dataclass(frozen=True)
class Engine:
    """A model's folder and the engine directory exported from it."""

    model: Path
    path: Path


Updates = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def make_updates(model: torch.nn.Module, modules: list[str], seed: int = 0, rank: int = RANK) -> Updates:
    """(down, up) of linear layers and convolutions, by module."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in modules:
        weight = model.get_submodule(name).weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.2
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator) * 0.2
        found[name] = (down, up)
    return found


def merge_into(model: torch.nn.Module, updates: Updates, scale: float) -> None:
    """The same in torch: W += scale * up @ down."""
    with torch.no_grad():
        for name, (down, up) in updates.items():
            weight = model.get_submodule(name).weight
            weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def diffusers_keys(prefix: str) -> Callable[[str], tuple[str, str, str]]:
    return lambda m: (f"{prefix}{m}.lora_A.weight", f"{prefix}{m}.lora_B.weight", f"{prefix}{m}.alpha")


UNET_KEYS = diffusers_keys("unet.")


def old_keys(prefix: str) -> Callable[[str], tuple[str, str, str]]:
    return lambda m: (f"{prefix}{m}.lora.down.weight", f"{prefix}{m}.lora.up.weight", f"{prefix}{m}.alpha")


def kohya_keys(prefix: str) -> Callable[[str], tuple[str, str, str]]:
    def keys(module: str) -> tuple[str, str, str]:
        flat = prefix + module.replace(".", "_")
        return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"

    return keys


def save_lora(
    path: Path,
    updates: Updates,
    keys: Callable[[str], tuple[str, str, str]] = UNET_KEYS,
    *,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    tensors = dict(extra or {})
    for module, (down, up) in updates.items():
        down_key, up_key, alpha_key = keys(module)
        tensors[down_key], tensors[up_key] = (t.to(dtype).clone().contiguous() for t in (down, up))
        if alpha is not None:
            tensors[alpha_key] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def assert_lora_is_merged(
    engine_dir: Path,
    model: torch.nn.Module,
    modules: list[str],
    stock: Callable[[], np.ndarray],
    folder: Path,
    **call: Any,
) -> None:
    """An engine directory draws with a LoRA of a transformer what its stock pipeline draws with merged weights.

    model: the stock pipeline's transformer, which is left as it was. call: of the engine directory, whose seed is 3.
    """
    updates = make_updates(model, modules)
    file = save_lora(folder / "lora.safetensors", updates, diffusers_keys("transformer."))
    pipeline = Pipeline.from_engine_dir(engine_dir, "cpu", threads=1)
    without = np.asarray(pipeline(seed=3, **call).images)
    pipeline.load_lora(file, 0.5)
    found = np.asarray(pipeline(seed=3, **call).images)
    merge_into(model, updates, 0.5)
    try:
        want = stock()
    finally:
        merge_into(model, updates, -0.5)
    largest = np.abs(want).max()
    assert np.abs(found - want).max() <= 1e-4 * largest
    assert np.abs(found - without).max() > 1e-3 * largest
