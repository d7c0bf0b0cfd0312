"""A model folder with random weights from a configuration: one shard of a file in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2**30
_STEM = "diffusion_pytorch_model"


def write_model(entry: Mapping[str, Any], config: Mapping[str, Any], dtype: str, folder: Path, seed: int = 0) -> int:
    """A model's folder with its scheduler's configuration; returns the number of parameters.

    The folder is that of one denoiser, or where the entry has a ``pipeline`` that of a pipeline which holds nothing but
    its denoisers, each with weights of its own. dtype: of the files, ``fp32``, ``fp16`` or ``bf16``. Matrices are
    normal with variance 1 / inputs, factors of norms are 1 and biases 0, both with a little noise, so that no value is
    special and signals keep their size.
    """
    if (pipeline := entry.get("pipeline")) is None:
        count = _write_denoiser(entry["class_name"], config, dtype, folder, seed)
    else:
        names = pipeline["denoisers"]
        parts = {name: ["diffusers", entry["class_name"]] for name in names}
        index = {**pipeline["index"], **parts, "scheduler": ["diffusers", entry["scheduler"]]}
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        count = sum(
            _write_denoiser(entry["class_name"], config, dtype, folder / name, seed + number)
            for number, name in enumerate(names)
        )
    scheduler = folder / "scheduler"
    scheduler.mkdir()
    document = {"_class_name": entry["scheduler"], **entry["scheduler_config"]}
    (scheduler / "scheduler_config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return count


def _write_denoiser(class_name: str, config: Mapping[str, Any], dtype: str, folder: Path, seed: int) -> int:
    import diffusers
    import torch
    from safetensors.torch import save_file

    from dipgo_deploy.supernet.shards import parameters_on_meta

    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    with parameters_on_meta():
        model = getattr(diffusers, class_name)(**settings)
    parameters = {id(parameter) for parameter in model.parameters()}
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    shards: list[list[str]] = []
    count = 0
    pending: dict[str, torch.Tensor] = {}
    held = 0

    def flush() -> None:
        nonlocal held
        path = folder / f"{_STEM}-{len(shards) + 1:05d}.safetensors"
        save_file(pending, path, {"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        held = 0

    for name, tensor in model.state_dict(keep_vars=True).items():
        drawn = id(tensor) in parameters
        values = _draw(name, tensor, generator) if drawn else tensor.detach()
        pending[name] = values.to(wanted).contiguous() if values.is_floating_point() else values
        count += tensor.numel() if drawn else 0
        held += pending[name].nbytes
        if held >= SHARD_BYTES:
            flush()
    if pending:
        flush()
    _index(folder, shards)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    return count


def _draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    import torch

    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim > 1:
        return noise / math.sqrt(math.prod(parameter.shape[1:]))
    return 0.02 * noise + (1.0 if name.endswith("weight") else 0.0)


def _index(folder: Path, shards: list[list[str]]) -> None:
    """Give the files their final names, and say which tensor is in which."""
    weight_map = {}
    for number, names in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / f"{_STEM}{suffix}.safetensors"
        (folder / f"{_STEM}-{number:05d}.safetensors").rename(path)
        weight_map.update(dict.fromkeys(names, path.name))
    if len(shards) > 1:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        document = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{_STEM}.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")
