"""Parts of a model that is one file in its authors' layout: diffusers' converters, and every weight accounted for."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.files import Weights, describe_keys
from dipgo_deploy.models.single_file import DENOISER
from dipgo_deploy.supernet.shards import without_weights

Tensors = dict[str, torch.Tensor]

_PROJECTION = "text_projection.weight"

_log = logging.getLogger(__name__)


def load_from_file(
    owner: Any, library: str, name: str, folder: Path, weights: Weights, dtype: torch.dtype
) -> nn.Module:
    """A part (class ``owner`` of ``library``) with the configuration in ``folder`` and the weights of one file.

    Weights that are in ``dtype`` stay mapped.

    Raises:
        UserError: a class that diffusers converts no such file for, or weights that are not those of the configuration.
    """
    what = f"{weights.files[0]} with {folder}/config.json"
    try:
        load = _load_diffusers if library == "diffusers" else _load_transformers
        loaded, info = load(owner, name, folder, weights, dtype)
    except UserError:
        raise
    except Exception as error:  # diffusers' converters ask for the names that they know, transformers raises anything
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{what}: cannot be read as {owner.__name__} ({type(error).__name__}: {reason}); the configuration may be "
            "another model's"
        ) from error
    wrong = describe_keys(info, {key for key, _ in loaded.named_buffers()})
    if wrong is not None:
        raise UserError(f"{what}: not the weights of {owner.__name__} as it says: {wrong}")
    return loaded.eval()


def denoiser_tensors(weights: Weights, owner: Any, folder: Path) -> Tensors:
    """The tensors of a denoiser of a file under the names of its class, mapped where they are as in the file."""
    return _converted(owner, folder.name, folder, weights)[0]


def _load_diffusers(
    owner: Any, name: str, folder: Path, weights: Weights, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    tensors, config = _converted(owner, name, folder, weights)
    model = without_weights(owner, config, dtype)
    kept = frozenset(getattr(owner, "_keep_in_fp32_modules", None) or ())
    own, parameters = model.state_dict(), dict(model.named_parameters())
    info = {
        "missing_keys": [key for key in own if key not in tensors],
        "unexpected_keys": [key for key in tensors if key not in own],
        "mismatched_keys": [key for key in own if key in tensors and own[key].shape != tensors[key].shape],
    }
    fitting = {}
    for key in own.keys() & tensors.keys() - set(info["mismatched_keys"]):
        stays = torch.float32 if kept.intersection(key.split(".")) else dtype
        wanted = stays if key in parameters else own[key].dtype
        fitting[key] = tensors[key].to(wanted if tensors[key].is_floating_point() else tensors[key].dtype)
    model.load_state_dict(fitting, strict=False, assign=True)
    return model, info


def _converted(owner: Any, name: str, folder: Path, weights: Weights) -> tuple[Tensors, Mapping[str, Any]]:
    """A diffusers part's tensors under its class's names, and its configuration."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    stored = _stored(weights)
    config = owner.load_config(folder)
    bare = {key.removeprefix(weights.prefix or ""): tensor for key, tensor in stored.items()}
    if set(without_weights(owner, config, torch.float32).state_dict()) == set(bare):
        return bare, config
    convert = SINGLE_FILE_LOADABLE_CLASSES.get(owner.__name__, {}).get("checkpoint_mapping_fn")
    if convert is None:
        raise UserError(
            f"{weights.files[0]}: diffusers reads no single file as {owner.__name__}; give a folder in its format"
        )
    # The converter of UNets looks for the prefix, all others of denoisers take it off, which not all do.
    named = {f"{DENOISER}{key}": bare[key] for key in bare} if owner.__name__ == "UNet2DConditionModel" else bare
    before = sum(tensor.numel() for tensor in bare.values())
    converted = convert(checkpoint=stored if name == "vae" else named, config=config)
    if left := before - sum(tensor.numel() for tensor in converted.values()):
        _log.warning("%s: %d of %d numbers are of nothing that %s has", weights.files[0], left, before, owner.__name__)
    return converted, config


def _load_transformers(
    owner: Any, name: str, folder: Path, weights: Weights, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    config = owner.config_class.from_pretrained(folder)
    loaded, info = owner.from_pretrained(
        None,
        config=config,
        state_dict=_text_encoder_tensors(config, owner, weights),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return loaded, info


def _text_encoder_tensors(config: Any, owner: Any, weights: Weights) -> Tensors:
    """A text encoder's tensors under the names that transformers has."""
    utils = importlib.import_module("diffusers.loaders.single_file_utils")
    stored, prefix = _stored(weights), str(weights.prefix)
    if any(key.startswith(f"{prefix}transformer.resblocks.") for key in stored):  # of OpenCLIP
        return dict(utils.convert_open_clip_checkpoint(SimpleNamespace(config=config), stored, prefix=prefix))
    tensors = {key.removeprefix(prefix): tensor for key, tensor in stored.items()}
    projects = "Projection" in owner.__name__
    if projects and _PROJECTION not in tensors:
        # SD3's files are without, as of a model that was trained for its hidden states: the identity stands for it.
        tensors[_PROJECTION] = torch.eye(config.hidden_size)
    elif not projects:
        tensors.pop(_PROJECTION, None)  # what a whole CLIP model has behind its text encoder
    return tensors


def _stored(weights: Weights) -> Tensors:
    from safetensors.torch import load_file

    stored = load_file(weights.files[0])
    return {key: tensor for key, tensor in stored.items() if key.startswith(weights.prefix or "")}
