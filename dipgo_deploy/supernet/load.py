"""Denoisers and pipelines with their weights: from a built-in name, a folder in diffusers' format, or a hub id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dipgo_deploy.errors import UserError
from dipgo_deploy.models import ModelFamily
from dipgo_deploy.models.location import config_folder, denoiser_config, resolve_model
from dipgo_deploy.supernet.shards import load_shards

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

_FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_denoiser(
    folder_or_id: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, ModelFamily, dict[str, Any]]:
    """The denoiser of a pipeline (found through its ``model_index.json``), or of a folder of its own.

    Only safetensors are read, so nothing is unpickled.

    Returns:
        The model in evaluation mode with ``dtype`` parameters, its family, and its configuration as in its
        ``config.json`` (what a schedule's configuration hash is of).

    Raises:
        UserError: no such model, no supported denoiser in it, or files that cannot be read.
    """
    import diffusers

    folder = config_folder(folder_or_id)
    family, config = denoiser_config(folder)

    def load(class_name: str, subfolder: str | None) -> Any:
        owner = getattr(diffusers, class_name)
        part = folder / (subfolder or ".")
        files = weight_files(part)
        several = len(files) > 1 and all(file.is_file() for file in files) and _dtypes(files) == {dtype}
        found = load_shards(owner, part, files, dtype) if several else None
        options = {} if subfolder is None else {"subfolder": subfolder}
        return _pretrained(owner, folder_or_id, dtype, **options) if found is None else found

    model = load(family.diffusers_class, family.component if (folder / "model_index.json").is_file() else None)
    others = {name: load(class_name, name) for name, class_name in family.companions.items()}
    for part in (model, *others.values()):
        kept = getattr(part, "_keep_in_fp32_modules", None)
        if not kept and any(parameter.dtype != dtype for parameter in part.parameters()):
            # Without accelerate diffusers leaves the files' dtype where the first tensor has it already, as SD3's does.
            part.to(dtype)
    return family.join(model, others).eval(), family, config


def stored_dtype(folder_or_id: str | Path) -> torch.dtype:
    """The one dtype of all floating-point weights in a denoiser's files, in which loading it only maps them.

    float32 where they have several, and for what is not a folder.
    """
    folder = config_folder(folder_or_id)
    family, _ = denoiser_config(folder)
    parts = (family.component, *family.companions) if (folder / "model_index.json").is_file() else (".",)
    found = _dtypes([path for part in parts for path in weight_files(folder / part)])
    return found.pop() if len(found) == 1 else torch.float32


def _dtypes(files: Sequence[Path]) -> set[torch.dtype]:
    """Of the floating-point tensors in safetensors files."""
    import safetensors

    found: set[str] = set()
    for path in files:
        with safetensors.safe_open(path, "pt") as weights:
            found.update(weights.get_slice(name).get_dtype() for name in weights.keys())  # noqa: SIM118
    return {_FLOATING[name] for name in found & _FLOATING.keys()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that diffusers reads from a denoiser's own folder; none where there are none."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if not index.is_file():
        return []
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def load_pipeline(folder_or_id: str | Path, dtype: torch.dtype = torch.float32, **components: Any) -> Any:
    """The stock diffusers pipeline of a model, safetensors only; ``components`` are used instead of loaded.

    What its ``model_index.json`` has no class for is None, also where diffusers wants that said (SD3 without T5).

    Raises:
        UserError: no such model, or a file of it cannot be read.
    """
    import diffusers

    path = config_folder(folder_or_id) / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    absent = {name: None for name, classes in index.items() if classes == [None, None]}
    return _pretrained(diffusers.DiffusionPipeline, folder_or_id, dtype, **{**absent, **components})


def _pretrained(owner: Any, folder_or_id: str | Path, dtype: torch.dtype, **options: Any) -> Any:
    from diffusers.utils import is_accelerate_available

    source = resolve_model(folder_or_id)
    # Asked for without accelerate, the frugal way of loading only gives a warning.
    frugal = is_accelerate_available()
    try:
        return owner.from_pretrained(source, dtype=dtype, use_safetensors=True, low_cpu_mem_usage=frugal, **options)
    except Exception as error:  # diffusers, transformers, the hub's client and safetensors each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: {owner.__name__} cannot be loaded: {reason}") from error
