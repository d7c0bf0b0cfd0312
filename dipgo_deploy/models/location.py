"""Where a model is: built-in name, folder in diffusers' format, hub id, one file. Reads configurations without torch.

A model's name may say how it is read: ``NAME?variant=fp16&pipeline=StableDiffusionPipeline`` takes weights of that
variant where a part has them, and the parts of that pipeline where the folder names one that does more.
``model.safetensors?config=FOLDER`` is a file in its authors' layout, with the configurations, tokenizers, and the parts
that are not in it, of a folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from os.path import commonprefix
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from dipgo_deploy.documents import read_document
from dipgo_deploy.errors import UserError
from dipgo_deploy.models import ip_adapter
from dipgo_deploy.models.defaults import class_defaults, with_defaults
from dipgo_deploy.models.family import ModelFamily, numbered
from dipgo_deploy.models.image_encoder import check_processor
from dipgo_deploy.models.quantized import gguf_refused, is_gguf, refuse_quantised_settings
from dipgo_deploy.models.registry import families, family_for
from dipgo_deploy.schedule.identity import FILE_HASH, file_hash

BUILT_IN = ("fashion-sd", "fashion-dit")
INDEX = "model_index.json"

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Published DiT and PixArt folders name a class that diffusers has split since: by `norm_type` it loads one of these.
_SPLIT_CLASS = "Transformer2DModel"
_BY_NORM = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}

# Tokenizers whose length is the text encoder's, and what transformers takes for one that is not said (10^30).
_SIZED_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_NO_LENGTH = 10**6
_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# Layers, or latent pixels of a side.
_MOST = 2**16


@dataclass(frozen=True)
class ReadOptions:
    """How a model is read. variant: of its weight files. pipeline: diffusers class instead of the one it names. config:
    folder with the configurations of a model that is one file. ip_adapter: a file of weights beside it. image_encoder:
    that adapter's, by default the folder of this name beside the file."""

    variant: str | None = None
    pipeline: str | None = None
    config: str | None = None
    ip_adapter: str | None = None
    image_encoder: str | None = None

    @property
    def encoder_folder(self) -> Path | None:
        """The image encoder's folder, None without an adapter."""
        if self.ip_adapter is None:
            return None
        return Path(self.image_encoder or Path(self.ip_adapter).parent / "image_encoder")


def with_options(model: str, **given: str | None) -> str:
    """The name of a model that says how it is read, by the fields of ``ReadOptions``; what is None stays as it is."""
    name, options = _split(model)
    chosen = asdict(replace(options, **{key: value for key, value in given.items() if value is not None}))
    query = urlencode({key: value for key, value in chosen.items() if value is not None}, safe="/")
    return f"{name}?{query}" if query else name


def read_options(model: str | Path) -> ReadOptions:
    """How a model's name says that it is read. Raises UserError for options that do not exist."""
    return _split(model)[1]


def lasting_name(model: str) -> str:
    """A name that is good in any working directory: absolute paths; built-in names and hub ids stay."""
    name, options = _split(model)
    paths = ("config", "ip_adapter", "image_encoder")
    lasting = {key: value and _absolute(value) if key in paths else value for key, value in asdict(options).items()}
    return with_options(_absolute(name), **lasting)


def _absolute(name: str) -> str:
    there = name not in BUILT_IN and (_is_dir(Path(name)) or _is_file(Path(name)))
    return str(Path(name).absolute()) if there else name


def _split(model: str | Path) -> tuple[str, ReadOptions]:
    name, mark, query = str(model).rpartition("?")
    if not mark or _is_dir(Path(model)):
        return str(model), ReadOptions()
    options = dict(parse_qsl(query, keep_blank_values=True))
    if not options or not options.keys() <= {field.name for field in fields(ReadOptions)} or not all(options.values()):
        raise UserError(
            f"{model}: after the ? there may be variant=NAME, pipeline=CLASS, config=FOLDER, ip_adapter=FILE and "
            "image_encoder=FOLDER, joined by &"
        )
    return name, ReadOptions(**options)


def resolve_model(name_or_path: str | Path) -> str:
    """The folder of a built-in name or of an existing folder, that of the configurations for a model that is one file;
    an ``owner/name`` that is no folder stays as it is.

    How the model is read is left out. Raises UserError for anything else, and for a built-in model whose files were not
    installed.
    """
    name, options = _split(name_or_path)
    if single_file(name_or_path) is not None:
        return _config_of_file(Path(name), options.config)
    if options.config is not None:
        raise UserError(f"{name}: --config is for a model that is one .safetensors file; leave it out")
    if name in BUILT_IN:
        folder = _ASSETS / name
        if not (folder / INDEX).is_file():
            raise UserError(f"{name}: the built-in model is missing from this installation; install dipgo-deploy again")
        return str(folder)
    if name and _is_dir(Path(name)):
        return name
    if _HUB_ID.fullmatch(name):
        return name
    raise UserError(f"{name or repr(name)}: no such folder, nor one of the built-in models {', '.join(BUILT_IN)}")


def single_file(model: str | Path) -> Path | None:
    """The file of a model that is one file, None for any other."""
    name, _ = _split(model)
    path = Path(name)
    return path if name and name not in BUILT_IN and not _is_dir(path) and _looked_at(path, path.exists) else None


def _config_of_file(path: Path, config: str | None) -> str:
    """The folder beside a model that is one file. Raises UserError for a file that is not read, or without a folder."""
    if not _is_file(path):
        raise UserError(f"{path}: not a regular file; give a model's folder, or a .safetensors file")
    if _looked_at(path, lambda: is_gguf(path)):
        raise gguf_refused(path)
    if path.suffix in _PICKLED:
        raise UserError(f"{path}: {path.suffix} files are pickled and never read; save it as .safetensors")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: is a file; give the model's folder, or a .safetensors file with --config FOLDER")
    if config is None:
        raise UserError(
            f"{path}: one file does not say what its model is; give --config FOLDER with that model's configurations "
            "and tokenizers in diffusers' format (nothing is downloaded)"
        )
    if config in BUILT_IN:
        return resolve_model(config)
    if not _is_dir(Path(config)):
        raise UserError(f"--config {config}: no such folder; give one in diffusers' format")
    return config


def config_folder(name_or_path: str | Path) -> Path:
    """A folder with the model's configuration files; for a hub id they are downloaded (no weights).

    Raises UserError when the hub does not give them; ModuleNotFoundError without the extra ``export``.
    """
    model = resolve_model(name_or_path)
    if _is_dir(Path(model)):
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json"]))
    except Exception as error:  # no network, no such model, no access: the hub's client raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{model}: no folder of that name, and the hub does not give it: {reason}") from error


def denoiser_config(model: str | Path) -> tuple[ModelFamily, dict[str, Any]]:
    """Family of a model and the configuration of its denoiser, with the defaults of its class filled in.

    model: as for ``resolve_model``; a pipeline's folder, or a denoiser's own. Everything that configuration files alone
    decide is refused here, before anything is loaded.

    Raises:
        UserError: a folder without configuration or with one that cannot be read; a denoiser, pipeline or setting that
            is not supported.
    """
    folder = config_folder(model)
    pipeline = read_options(model).pipeline
    if _is_file(folder / INDEX):
        index = read_configuration(folder / INDEX)
        if _class_in(index, "transformer") == _SPLIT_CLASS:
            actual = _class_of(read_configuration(folder / "transformer" / "config.json"))
            index = {**index, "transformer": ["diffusers", actual]}
        options = read_options(model)
        family = _family_of_pipeline(folder, index, options)
        if single_file(model) is None:
            _check_not_quantised(folder, family, index)
        config = read_configuration(folder / family.component / "config.json")
        others = {
            name: read_configuration(folder / name / "config.json") for name in companion_folders(folder, family, index)
        }
        if family.image_encoder is not None:
            others |= _image_encoder(folder, index, *family.image_encoder)
        if options.ip_adapter is not None and options.encoder_folder is not None:
            others[ip_adapter.ADAPTER] = ip_adapter.read_adapter(Path(options.ip_adapter), options.encoder_folder)
        whole = _filled(family, config, others)
        _check_settings(folder, family, whole)
        _check_pipeline(folder, family, index, pipeline)
        _check_tokenizers(folder, index)
        _check_vae(folder, family, family.latent_channels(whole))
        return family, whole
    if read_options(model).ip_adapter is not None:
        raise UserError(f"{folder}: no {INDEX}: --ip-adapter needs the folder of a pipeline")
    if pipeline is not None:
        raise UserError(f"{folder}: no {INDEX}: there is no pipeline to be read as {pipeline}")
    if _is_file(folder / "config.json"):
        config = read_configuration(folder / "config.json")
        family = family_for(_class_of(config))
        if single_file(model) is None:
            refuse_quantised_settings(folder / "config.json", config)
        whole = _filled(family, config, {})
        _check_settings(folder, family, whole)
        return family, whole
    raise UserError(f"{folder}: no {INDEX} or config.json; give a folder in diffusers' format")


def _image_encoder(folder: Path, index: Mapping[str, Any], name: str, processor: str) -> dict[str, dict[str, Any]]:
    """The configuration of a pipeline's image encoder by its name; nothing where it has none."""
    if _class_in(index, name) is None:
        return {}
    config = read_configuration(folder / name / "config.json")
    prepared = folder / processor / "preprocessor_config.json"
    check_processor(prepared, read_configuration(prepared), config)
    return {name: config}


def scheduler_config(folder: str | Path) -> dict[str, Any] | None:
    """The scheduler's configuration in a pipeline's folder (with its ``_class_name``), None where there is none."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    return read_configuration(path) if _is_file(path) else None


def pipeline_index(model: str | Path) -> dict[str, Any]:
    """``model_index.json`` with the pipeline's class that the model is read as; empty where there is none."""
    path = config_folder(model) / INDEX
    if not _is_file(path):
        return {}
    chosen = read_options(model).pipeline
    return {**read_configuration(path), **({} if chosen is None else {"_class_name": chosen})}


def component_config(folder: str | Path, name: str) -> dict[str, Any] | None:
    """``config.json`` of a pipeline's part, None where there is none."""
    path = Path(folder) / name / "config.json"
    return read_configuration(path) if _is_file(path) else None


def native_size(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Height and width of the latent that a denoiser was made for, None where its configuration does not say."""
    match config.get("sample_size"):
        case int(side) if side > 0:
            return side, side
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None


def _filled(family: ModelFamily, config: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A denoiser's configuration, and its companions' in it, with the defaults of their classes."""
    classes = family.companions_in(others)
    companions = {
        name: with_defaults(class_defaults(classes[name]), other) if name in classes else dict(other)
        for name, other in others.items()
    }
    hashed = file_hash({**config, **others})
    return {**with_defaults(family.defaults or {}, config), **companions, FILE_HASH: hashed}


def _check_settings(folder: Path, family: ModelFamily, config: Mapping[str, Any]) -> None:
    """Refuse what the family refuses at any size, and counts that no model has."""
    for key in ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers", "layers_per_block", "sample_size"):
        if isinstance(config.get(key), int | float) and not 0 <= config[key] <= _MOST:
            raise UserError(f"{folder / family.component}: {key} = {config[key]}: is at most {_MOST}")
    try:
        family.blocks(config, family.granularities[0])
        family.latent_channels(config)
        # The least size that the family's own check of sizes lets through.
        multiple = 64 if family.size_multiple is None else family.size_multiple(config)
        size = (native_size(config) if family.size_multiple is None else None) or (multiple,) * family.axes
        family.inputs(config, 1, *size, text_length=1)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder / family.component}: a setting of its config.json has another type than {family.diffusers_class} "
            f"takes ({type(error).__name__}: {error})"
        ) from error


def _check_pipeline(folder: Path, family: ModelFamily, index: Mapping[str, Any], pipeline: str | None) -> None:
    """Refuse a pipeline that may do more than prompt, denoiser and VAE: what it does beyond them would be dropped."""
    for other in families().values():
        if other.index.items() <= index.items() and not other.index.items() <= family.index.items():
            entry = ", ".join(f"{key} = {value}" for key, value in other.index.items())
            raise UserError(f"{folder}: {entry}: only {' or '.join(other.pipelines)} has an input for it; use that one")
    second = f"{family.component}_2"
    if second not in family.companions and _class_in(index, second) is not None:
        raise UserError(
            f"{folder}: has a {second}, a model of its own for a part of the steps (Wan 2.2), which is not supported; "
            "use a model of one"
        )
    name = pipeline or index.get("_class_name")
    if name in family.pipelines:
        return
    offered = " or ".join(family.pipelines)
    first = max(family.pipelines, key=lambda known: len(commonprefix([known, str(name)])))
    raise UserError(
        f"{folder}: {name} is not supported, only {offered}; --pipeline {first} (or the model as "
        f"{folder}?pipeline={first}) takes the parts of that one and leaves out what else the folder's does"
    )


def _check_not_quantised(folder: Path, family: ModelFamily, index: Mapping[str, Any]) -> None:
    """Refuse a part whose configuration says that its weights are quantised."""
    for name in {**index, **dict.fromkeys(companion_folders(folder, family, index))}:
        parts = (family.component, *companion_folders(folder, family, index), "vae")
        if name in parts or name.startswith("text_encoder"):
            refuse_quantised_settings(folder / name / "config.json", component_config(folder, name) or {})


def _check_tokenizers(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse tokenizers that do not say how many tokens their encoder takes."""
    for name in index:
        path = folder / name / "tokenizer_config.json"
        if not name.startswith("tokenizer") or _class_in(index, name) not in _SIZED_TOKENIZERS or not _is_file(path):
            continue
        length = read_configuration(path).get("model_max_length")
        if not isinstance(length, int) or not 2 <= length <= _NO_LENGTH:
            raise UserError(
                f"{path}: model_max_length is {'missing' if length is None else length}; "
                "write the number of tokens that the text encoder takes there (77 for CLIP)"
            )


def _check_vae(folder: Path, family: ModelFamily, channels: int) -> None:
    """Refuse a VAE whose latents are not those of the denoiser, or that is not as the family needs it."""
    config = component_config(folder, "vae") or {}
    made = config.get("latent_channels", config.get("z_dim"))
    if isinstance(made, int) and (made := made * family.packing**2) != channels:
        raise UserError(f"{folder}: its VAE makes latents of {made} channels, its denoiser takes {channels}")
    for key, value in family.vae_settings.items():
        if config.get(key, value) != value:
            raise UserError(f"{folder}: its VAE has {key} = {config[key]}, {family.pipelines[0]} is for {value} only")


def _family_of_pipeline(folder: Path, index: Mapping[str, Any], options: ReadOptions) -> ModelFamily:
    """By its class, or the one that the folder is read as, its components, and an adapter beside it."""
    pipeline = options.pipeline
    adapter = None if options.ip_adapter is None else ip_adapter.ADAPTER
    if options.image_encoder is not None and adapter is None:
        raise UserError("--image-encoder: is that of an IP-Adapter; give --ip-adapter, too")
    adapted = [family for family in families().values() if family.adapter == adapter]
    allowed = [family for family in adapted if pipeline is None or pipeline in family.pipelines]
    if not allowed:
        known = ", ".join(sorted({name for family in families().values() for name in family.pipelines}))
        raise UserError(f"--pipeline {pipeline}: is not supported; use one of {known}")
    name = pipeline or index.get("_class_name")
    # What has more of its components there comes first: a UNet with a ControlNet is not a UNet alone. Variants of one
    # class are told apart by their pipelines; a pipeline that nobody has is refused by the plain one.
    for family in sorted(allowed, key=lambda family: (-len(family.companions), name not in family.pipelines)):
        wanted = {family.component: family.diffusers_class, **family.companions}
        fits = all(
            (found := _class_in(index, part)) is not None and found in (class_name, family.several.get(part))
            for part, class_name in wanted.items()
        )
        if fits and {**family.index, **family.settings}.items() <= index.items():
            control = _class_in(index, "controlnet")
            if control is not None and "controlnet" not in wanted and pipeline is None:
                raise UserError(f"{folder}: {control} is not supported; use a pipeline with a ControlNetModel")
            return family
    raise UserError(
        f"{folder}: {pipeline or index.get('_class_name')} has no supported denoiser; "
        f"use a pipeline with one of {', '.join(sorted(family.class_name for family in allowed))}"
    )


def companion_folders(folder: Path, family: ModelFamily, index: Mapping[str, Any]) -> list[str]:
    """The folders of a family's companions; of one that the index has several of as many as there are."""
    there = {name for name in (path.name for path in folder.iterdir()) if _is_dir(folder / name)}
    names = []
    for name in family.companions:
        several = name in family.several and _class_in(index, name) == family.several[name]
        names += (several and numbered(name, there)) or [name]
    return names


def _class_of(config: Mapping[str, Any]) -> str:
    """The diffusers class that loads a denoiser's configuration."""
    name = str(config.get("_class_name"))
    return _BY_NORM.get(str(config.get("norm_type")), name) if name == _SPLIT_CLASS else name


def _class_in(index: Mapping[str, Any], component: str) -> str | None:
    match index.get(component):
        case [_, str(class_name)]:
            return class_name
    return None


def _is_file(path: Path) -> bool:
    """``Path.is_file``, but what cannot be looked at is a user's mistake."""
    return _looked_at(path, path.is_file)


def _is_dir(path: Path) -> bool:
    """The same of ``Path.is_dir``."""
    return _looked_at(path, path.is_dir)


def _looked_at(path: Path, look: Callable[[], bool]) -> bool:
    try:
        return look()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_configuration(path: Path) -> dict[str, Any]:
    """One of a model's JSON files. Raises UserError for a file that cannot be read, is too large, or holds none."""
    return read_document(path, "configuration", infinite=True)
