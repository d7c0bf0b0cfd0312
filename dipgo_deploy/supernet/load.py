"""Denoisers and pipelines with their weights: from a built-in name, a folder in diffusers' format, or a hub id."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from dipgo_deploy.errors import UserError
from dipgo_deploy.models import ModelFamily, ip_adapter
from dipgo_deploy.models.family import numbered
from dipgo_deploy.models.files import (
    Weights,
    denoiser_weights,
    describe_keys,
    dtypes,
    is_here,
    loaded_parts,
    part_weights,
)
from dipgo_deploy.models.image_encoder import side_of
from dipgo_deploy.models.location import (
    INDEX,
    config_folder,
    denoiser_config,
    pipeline_index,
    read_options,
    resolve_model,
)
from dipgo_deploy.supernet.one_file import denoiser_tensors, load_from_file
from dipgo_deploy.supernet.shards import load_shards

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
    folder = config_folder(folder_or_id)
    family, config = denoiser_config(folder_or_id)
    weights = denoiser_weights(folder_or_id)

    def load(class_name: str, name: str) -> Any:
        return _load_part(folder_or_id, name, "diffusers", class_name, weights.get(name), dtype)

    model = load(family.diffusers_class, family.component if (folder / INDEX).is_file() else ".")
    adapter = read_options(folder_or_id).ip_adapter
    if adapter is not None:
        ip_adapter.attach(model, Path(adapter))
    others = {name: load(class_name, name) for name, class_name in family.companions_in(config).items()}
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
    found = {dtype for weights in denoiser_weights(folder_or_id).values() for dtype in _floating(weights)}
    return found.pop() if len(found) == 1 else torch.float32


def stored_tensors(folder_or_id: str | Path, name: str, weights: Weights) -> dict[str, torch.Tensor]:
    """Of the denoiser's part ``name`` (as ``denoiser_weights`` has it), under its class's names, mapped."""
    from safetensors.torch import load_file

    if weights.prefix is None:
        return {key: tensor for file in weights.files for key, tensor in load_file(file).items()}
    family, _ = denoiser_config(folder_or_id)
    owner = getattr(importlib.import_module("diffusers"), family.diffusers_class)
    return denoiser_tensors(weights, owner, config_folder(folder_or_id) / name)


def _floating(weights: Weights) -> set[torch.dtype]:
    """Of a part's floating-point tensors."""
    return {_FLOATING[name] for name in dtypes(weights) & _FLOATING.keys()}


def load_pipeline(folder_or_id: str | Path, dtype: torch.dtype = torch.float32, **components: Any) -> Any:
    """The stock diffusers pipeline of a model, safetensors only; ``components`` are used instead of loaded.

    What an export does not use (a safety checker) is not loaded and None, as is what ``model_index.json`` has no class
    for.

    Raises:
        UserError: no such model, a file of it that cannot be read, or weights that are not those of its classes.
    """
    import diffusers

    index = pipeline_index(folder_or_id)
    family, config = denoiser_config(folder_or_id)
    if not index:
        raise UserError(f"{folder_or_id}: has no {INDEX}; give the folder of a pipeline")
    source = resolve_model(folder_or_id)
    parts = loaded_parts(folder_or_id)
    absent = {name: None for name, value in index.items() if isinstance(value, list) and name not in parts}
    loaded: dict[str, Any] = {}
    afterwards: dict[str, Any] = {}
    for name, (library, class_name) in parts.items():
        if name in components or name == "scheduler":
            continue
        if family.image_encoder is not None and name == family.image_encoder[1]:
            # It comes in afterwards, too: it stands in the place of a class that may need torchvision.
            loaded[name], afterwards[name] = None, image_processor(side_of(config[family.image_encoder[0]]))
        elif not name.startswith("tokenizer"):
            loaded[name] = _load_part(folder_or_id, name, library, class_name, None, dtype)
        elif class_name.endswith("Processor"):
            # Its class cannot be looked at where what it needs is missing, so that it comes in afterwards.
            loaded[name], afterwards[name] = None, _tokenizer_of_processor(source, name)
    encoder = read_options(folder_or_id).encoder_folder
    if encoder is not None:
        loaded |= _image_encoder(encoder, dtype)
    for name, class_name in family.several.items():
        each = [loaded.pop(part) for part in numbered(name, loaded)]
        loaded[name] = each[0] if len(each) == 1 else getattr(diffusers, class_name)(each)
    owner = getattr(diffusers, str(index["_class_name"]))
    given = {**absent, **loaded, **components}
    try:
        pipeline = owner.from_pretrained(
            source, dtype=dtype, use_safetensors=True, low_cpu_mem_usage=_frugal(), **given
        )
    except Exception as error:  # diffusers, transformers and the hub's client each raise their own
        raise UserError(f"{source}: {owner.__name__} cannot be loaded: {_reason(error)}") from error
    pipeline.register_modules(**afterwards)
    return pipeline


def _image_encoder(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """An IP-Adapter's image encoder, and the preparation of pictures that diffusers gives it."""
    encoder = _load_part(folder, ".", "transformers", "CLIPVisionModelWithProjection", None, dtype)
    return {"image_encoder": encoder.eval(), "feature_extractor": image_processor(encoder.config.image_size)}


def image_processor(side: int) -> Any:
    """CLIP's preparation of pictures for an encoder of so many pixels."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size=side, crop_size=side)


def _tokenizer_of_processor(source: str, name: str) -> Any:
    """The tokenizer, with its chat template, of a processor that takes pictures too: those parts need torchvision."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, subfolder=name)
    except Exception as error:  # transformers raises anything here
        raise UserError(f"{source}/{name}: its tokenizer cannot be loaded: {_reason(error)}") from error


def _load_part(
    model: str | Path, name: str, library: str, class_name: str, weights: Weights | None, dtype: torch.dtype
) -> Any:
    """A model of a pipeline, every weight from its files. name: its folder there, ``.`` for the model's own.

    Raises:
        UserError: a class that does not exist, files that cannot be read, names or shapes of weights that are others.
    """
    source = str(config_folder(model)) if is_here(model) else resolve_model(model)
    what = source if name == "." else f"{source}/{name}"
    owner = getattr(importlib.import_module(library), class_name, None)
    if owner is None:
        raise UserError(f"{what}: {library} has no class {class_name}; update it, or use another model")
    if weights is None and is_here(model):
        weights = part_weights(model, name, library, class_name)
    if weights is not None and weights.prefix is not None:
        return load_from_file(owner, library, name, Path(source) / name, weights, dtype)
    several = weights is not None and library == "diffusers" and len(weights.files) > 1
    options: dict[str, Any] = {} if name == "." else {"subfolder": name}
    variant = read_options(model).variant if weights is None else weights.variant
    if variant is not None:
        options["variant"] = variant
    if library == "diffusers":
        options["low_cpu_mem_usage"] = _frugal()
    try:
        if weights is not None and several and _floating(weights) == {dtype}:
            shards = load_shards(owner, Path(source) / name, weights.files, dtype)
            if shards is not None:
                return shards
        with _nothing_kept(owner) as kept:
            stored = _floating(weights) if kept and weights is not None else {dtype}
            loaded, info = owner.from_pretrained(
                source,
                dtype=dtype if stored == {dtype} else torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # else the first stops the loading; all are refused below
                **options,
            )
    except Exception as error:  # diffusers, transformers, the hub's client and safetensors each raise their own
        raise UserError(f"{what}: {class_name} cannot be loaded: {_reason(error)}") from error
    wrong = describe_keys(info, {key for key, _ in loaded.named_buffers()})
    if wrong is not None:
        raise UserError(f"{what}: not the weights of {class_name} as its config.json has it: {wrong}")
    for name, parameter in loaded.named_parameters() if kept else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if kept.intersection(name.split(".")) else dtype)
    return loaded


@contextmanager
def _nothing_kept(owner: Any) -> Iterator[frozenset[str]]:
    """The names of modules that stay in float32 and that diffusers does not keep by itself: without accelerate it loads
    no model of a class that has some, unless the class is without them for as long as the block runs."""
    kept = frozenset(getattr(owner, "_keep_in_fp32_modules", None) or ())
    if not kept or _frugal() or not owner.__module__.startswith("diffusers."):
        yield frozenset()
        return
    with mock.patch.object(owner, "_keep_in_fp32_modules", None):
        yield kept


def _frugal() -> bool:
    """Asked for without accelerate, the frugal way of loading only gives a warning."""
    from diffusers.utils import is_accelerate_available

    return bool(is_accelerate_available())


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
