"""Where a model is: built-in name, folder in diffusers' format, or hub id. Reads configurations without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.family import ModelFamily
from dipgo_deploy.models.registry import FAMILIES, family_for

BUILT_IN = ("fashion-sd", "fashion-dit")

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Published DiT and PixArt folders name a class that diffusers has split since: by `norm_type` it loads one of these.
_SPLIT_CLASS = "Transformer2DModel"
_BY_NORM = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def resolve_model(name_or_path: str | Path) -> str:
    """The folder of a built-in name or of an existing folder; an ``owner/name`` that is no folder stays as it is.

    Raises UserError for anything else, and for a built-in model whose files were not installed.
    """
    name = str(name_or_path)
    if name in BUILT_IN:
        folder = _ASSETS / name
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{name}: the built-in model is missing from this installation: install dipgo-deploy again")
        return str(folder)
    if name and Path(name).is_dir():
        return name
    if name and Path(name).exists():
        raise UserError(f"{name}: is a file: give the model's folder")
    if _HUB_ID.fullmatch(name):
        return name
    raise UserError(f"{name or repr(name)}: no such folder, nor one of the built-in models {', '.join(BUILT_IN)}")


def config_folder(name_or_path: str | Path) -> Path:
    """A folder with the model's configuration files; for a hub id they are downloaded (no weights).

    Raises UserError when the hub does not give them; ModuleNotFoundError without the extra ``export``.
    """
    model = resolve_model(name_or_path)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json"]))
    except Exception as error:  # no network, no such model, no access: the hub's client raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{model}: no folder of that name, and the hub does not give it: {reason}") from error


def denoiser_config(folder: str | Path) -> tuple[ModelFamily, dict[str, Any]]:
    """Family and ``config.json`` of the denoiser in a pipeline's folder, or in a denoiser's own.

    Raises UserError for a folder without configuration, with one that cannot be read, or of an unsupported class.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        index = _read_json(folder / "model_index.json")
        if _class_in(index, "transformer") == _SPLIT_CLASS:
            actual = _class_of(_read_json(folder / "transformer" / "config.json"))
            index = {**index, "transformer": ["diffusers", actual]}
        family = _family_of_pipeline(folder, index)
        config = _read_json(folder / family.component / "config.json")
        others = {name: _read_json(folder / name / "config.json") for name in family.companions}
        return family, {**config, **others}
    if (folder / "config.json").is_file():
        config = _read_json(folder / "config.json")
        return family_for(_class_of(config)), config
    raise UserError(f"{folder}: no model_index.json or config.json: give a folder in diffusers' format")


def scheduler_config(folder: str | Path) -> dict[str, Any] | None:
    """The scheduler's configuration in a pipeline's folder (with its ``_class_name``), None where there is none."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    return _read_json(path) if path.is_file() else None


def _family_of_pipeline(folder: Path, index: Mapping[str, Any]) -> ModelFamily:
    # What has more of its components there comes first: a UNet with a ControlNet is not a UNet alone.
    for family in sorted(FAMILIES.values(), key=lambda family: -len(family.companions)):
        wanted = {family.component: family.diffusers_class, **family.companions}
        if all(_class_in(index, name) == class_name for name, class_name in wanted.items()):
            control = _class_in(index, "controlnet")
            if control is not None and "controlnet" not in wanted:
                raise UserError(f"{folder}: {control} is not supported: use a pipeline with one ControlNetModel")
            return family
    raise UserError(
        f"{folder}: {index.get('_class_name')} has no supported denoiser: "
        f"use a pipeline with one of {', '.join(sorted(FAMILIES))}"
    )


def _class_of(config: Mapping[str, Any]) -> str:
    """The diffusers class that loads a denoiser's configuration."""
    name = str(config.get("_class_name"))
    return _BY_NORM.get(str(config.get("norm_type")), name) if name == _SPLIT_CLASS else name


def _class_in(index: Mapping[str, Any], component: str) -> str | None:
    match index.get(component):
        case [_, str(class_name)]:
            return class_name
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: not a JSON object")
    return document
