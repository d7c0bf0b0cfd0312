"""The weight files of a model's parts: which ones are read, and whether they can be."""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipgo_deploy.errors import UserError
from dipgo_deploy.extras import install
from dipgo_deploy.files import unfit_file
from dipgo_deploy.models.location import (
    INDEX,
    config_folder,
    denoiser_config,
    pipeline_index,
    read_configuration,
    read_options,
    resolve_model,
    single_file,
)
from dipgo_deploy.models.quantized import refuse_quantised_weights
from dipgo_deploy.models.single_file import prefix_in_file

# What diffusers and transformers call them.
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_SUFFIX = ".safetensors"
_SMALL = (".json", ".txt", ".model")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """The safetensors files of one part (folder) of a model.

    variant: in their names (``fp16``). prefix: of a model that is one file: what the part's tensors begin with in it,
    behind which they have their authors' names; None for files in diffusers' format.
    """

    files: tuple[Path, ...]
    variant: str | None = None
    prefix: str | None = None


def weights_of(part: Path, library: str, variant: str | None = None) -> Weights:
    """The files that a part is loaded from: those of ``variant`` where it has them, else those without a variant,
    else those of the one variant that there is.

    library: ``diffusers`` or ``transformers``. Every file was opened, and has the tensors that its index says.

    Raises:
        UserError: no such files, several variants to choose from, or one that is not whole.
    """
    stem = STEMS[library]
    found = _by_variant(part, stem)
    chosen = variant if variant in found else None if None in found else next(iter(found), None)
    if not found:
        raise UserError(f"{part}: {_why_none(part, stem)}")
    if chosen not in (variant, None) and len(found) > 1:
        raise UserError(
            f"{part}: has weights of the variants {', '.join(sorted(map(str, found)))}; choose with --variant"
        )
    first = found[chosen]
    files = _of_index(first) if first.suffix == ".json" else {first: None}
    for file, names in files.items():
        _check(file, names)
    return Weights(tuple(files), chosen)


def denoiser_weights(model: str | Path) -> dict[str, Weights]:
    """Of the denoiser and its companions, by folder name (``.`` for a folder that is a denoiser's own); a part whose
    files are not here (of a hub id, before it is loaded) is left out. Raises as ``weights_of``."""
    if not is_here(model):
        return {}
    family, config = denoiser_config(model)
    whole = (config_folder(model) / INDEX).is_file()
    parts = {family.component if whole else ".": family.diffusers_class, **family.companions_in(config)}
    return {name: part_weights(model, name, "diffusers", class_name) for name, class_name in parts.items()}


def part_weights(model: str | Path, name: str, library: str, class_name: str) -> Weights:
    """The files of one part of a model that is here: those of its folder, or the one file that has everything.

    name: the part's folder, ``.`` for a folder that is a denoiser's own. Raises as ``weights_of``.
    """
    file = single_file(model)
    # A companion (a ControlNet) is a model of its own, with files of its own.
    if file is not None and name not in _companions(model):
        prefix = prefix_in_file(_whole_file(file), name, class_name)
        if prefix is not None:
            return Weights((file,), None, prefix)
    folder = config_folder(model)
    try:
        return weights_of(folder / name, library, read_options(model).variant)
    except UserError as error:
        if file is None:
            raise
        raise UserError(
            f"{file}: has no {name}, and {error} (where the pipeline can do without, write [null, null] for it and its "
            f"tokenizer in {INDEX})"
        ) from None


def _companions(model: str | Path) -> Mapping[str, str]:
    family, config = denoiser_config(model)
    return family.companions_in(config)


@functools.lru_cache(maxsize=4)
def _names_at(path: Path, time: int, size: int) -> tuple[str, ...]:
    _check(path, None)
    return tuple(_types_in(path))


def _whole_file(path: Path) -> tuple[str, ...]:
    """Names of the tensors in a file, which is checked once as long as it stays the same."""
    status = path.stat()
    return _names_at(path, status.st_mtime_ns, status.st_size)


def check_weights(model: str | Path) -> dict[str, Weights]:
    """The files of every part that an export loads; none where they are not here (of a hub id).

    Raises:
        UserError: as ``weights_of``; a variant that no part has.
    """
    if not is_here(model):
        return {}
    folder, variant = config_folder(model), read_options(model).variant
    _check_regular(folder, loaded_parts(model) or (".",))
    weights_by_part = denoiser_weights(model)
    _check_units(model, weights_by_part)
    for name, (library, class_name) in loaded_parts(model).items():
        if name not in weights_by_part and not _is_small(name):
            weights_by_part[name] = part_weights(model, name, library, class_name)
    for name in loaded_parts(model):
        _check_small_files(folder / name)
        if name.startswith("tokenizer"):
            _check_tokenizer(folder / name)
    if variant is not None and all(weights.variant != variant for weights in weights_by_part.values()):
        raise UserError(f"{folder}: no part has weights of the variant {variant}; leave out --variant")
    return weights_by_part


def _check_regular(folder: Path, parts: Iterable[str]) -> None:
    """Refuse what is neither a file nor a folder: the libraries would wait for a pipe for ever."""
    for part in parts:
        try:
            wrong = [
                path for path in (folder / part).glob("*") if path.exists() and not (path.is_file() or path.is_dir())
            ]
        except OSError as error:
            raise UserError(f"{folder / part}: cannot be read: {error.strerror or error}") from error
        if wrong:
            raise UserError(f"{wrong[0]}: not a regular file; fetch it again")


def _check_units(model: str | Path, parts: Mapping[str, Weights]) -> None:
    """Refuse a configuration with more blocks than there are weights for, before all of them are made."""
    family, config = denoiser_config(model)
    every = [spec.name for spec in family.blocks(config, "block")]
    for denoiser in family.denoisers:
        component = denoiser or family.component
        name = component if component in parts else "."
        if name not in parts or parts[name].prefix is not None:
            continue
        stored = {tensor for path in parts[name].files for tensor in _types_in(path)}
        stems = {tensor[:place] for tensor in stored for place, letter in enumerate(tensor) if letter == "."}
        own = f"{denoiser}." if denoiser else ""
        units = [unit.removeprefix(own) for unit in every if unit.startswith(own)]
        units = [unit for unit in units if unit not in family.companions_in(config)]
        without = [unit for unit in units if unit not in stems]
        # With none at all it is the names that are others, which is said when they are loaded.
        if without and len(without) < len(units):
            raise UserError(
                f"{config_folder(model) / name}: its config.json says {len(units)} blocks, its weights have none for "
                f"{len(without)} of them (first: {without[0]}); fetch both again"
            )


def _types_in(path: Path) -> dict[str, str]:
    """Name of each tensor in a safetensors file -> its type (``F16``)."""
    import safetensors

    with safetensors.safe_open(path, "np") as weights:
        return {name: str(weights.get_slice(name).get_dtype()) for name in weights.keys()}  # noqa: SIM118


def _check_small_files(part: Path) -> None:
    """Refuse configurations and vocabularies that are not there themselves, or cannot be read."""
    for path in sorted(part.iterdir()) if part.is_dir() else []:
        if path.suffix in _SMALL:
            try:
                unfit = unfit_file(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
            if unfit is not None:
                raise UserError(f"{path}: {unfit}")


def _check_tokenizer(part: Path) -> None:
    """Refuse a tokenizer that only the package sentencepiece can read where that is missing or does not fit."""
    files = [part / name for name in ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")]
    found = next((path for path in files if path.is_file()), None)
    if found is None or (part / "tokenizer.json").is_file():
        return
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except Exception as error:  # not there, or made for another protobuf, which has an error of its own
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else "does not fit the protobuf here"
        raise UserError(
            f"{found}: is read with the package sentencepiece, which {reason}; {install('sentencepiece')}"
        ) from error


def say_variants(model: str | Path, parts: Mapping[str, Weights]) -> None:
    """One line in the log for each variant that is taken although nobody asked for it."""
    wanted = read_options(model).variant
    for variant in sorted({weights.variant for weights in parts.values() if weights.variant not in (None, wanted)}):
        names = [name for name, weights in parts.items() if weights.variant == variant]
        _log.warning("%s: has weights of the variant %s only (%s): they are taken", model, variant, ", ".join(names))


def loaded_parts(model: str | Path) -> dict[str, tuple[str, str]]:
    """What an export loads of a pipeline: name -> library and class; a safety checker and the like are not in it.

    Raises UserError for a part of another library than diffusers and transformers, whose code is not run.
    """
    index = pipeline_index(model)
    if not index:
        return {}
    family, config = denoiser_config(model)
    companions = family.companions_in(config)
    kept = (family.component, *family.companions, *(family.image_encoder or ()), "vae", "scheduler")
    scheme = family.text(config, None)
    encoders = () if scheme is not None and scheme.given else ("text_encoder", "tokenizer")
    parts = {
        name: (str(value[0]), str(value[1]))
        for name, value in index.items()
        if _names_a_class(value) and (name in kept or name.startswith(encoders))
    } | {name: ("diffusers", class_name) for name, class_name in companions.items()}
    for name, (library, class_name) in parts.items():
        if library not in STEMS:
            raise UserError(f"{model}: {name} is {library}.{class_name}: only diffusers and transformers are loaded")
    return parts


def left_out_parts(model: str | Path) -> dict[str, str]:
    """What a pipeline has beside that: name -> class."""
    loaded = loaded_parts(model)
    return {
        name: value[1]
        for name, value in pipeline_index(model).items()
        if _names_a_class(value) and name not in loaded and name[:1] != "_"
    }


def _names_a_class(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def is_here(model: str | Path) -> bool:
    """Whether a model's weights are on this machine; those of a hub id that are not are fetched when it is loaded."""
    if Path(resolve_model(model)).is_dir():
        return True
    folder, variant = config_folder(model), read_options(model).variant
    parts = {name: library for name, (library, _) in loaded_parts(model).items() if not _is_small(name)}
    try:
        for name, library in (parts or {".": "diffusers"}).items():
            weights_of(folder / name, library, variant)
    except UserError:
        return False
    return True


def _is_small(name: str) -> bool:
    """Whether a part has no weights."""
    return name.startswith(("tokenizer", "scheduler")) or name.endswith("_processor")


def _by_variant(part: Path, stem: str) -> dict[str | None, Path]:
    """Variant (None: without) -> its one file, or the index of its files."""
    files: dict[str | None, Path] = {}
    pattern = re.compile(
        rf"{re.escape(stem)}(?:\.(?P<one>[^.]+))?{re.escape(_SUFFIX)}(?P<index>\.index(?:\.(?P<many>[^.]+))?\.json)?"
    )
    try:
        names = sorted(path.name for path in part.iterdir()) if part.is_dir() else []
    except OSError as error:
        raise UserError(f"{part}: cannot be read: {error.strerror or error}") from error
    for name in names:
        match = pattern.fullmatch(name)
        if match is None or re.fullmatch(r".*-\d+-of-\d+", match["one"] or ""):
            continue  # one of several files: their index names it
        # One file is preferred to several, as diffusers and transformers do.
        if match["index"] is None or (match["many"] or match["one"]) not in files:
            files[match["many"] or match["one"]] = part / name
    return files


def _why_none(part: Path, stem: str) -> str:
    if not part.is_dir():
        return "is missing: the model is not whole"
    if any(part.glob("*.bin")):
        return f"has no {stem}{_SUFFIX}; its .bin files are pickled and never read: save it with safe_serialization"
    return f"has no {stem}{_SUFFIX}: the model is not whole"


def _of_index(path: Path) -> dict[Path, set[str] | None]:
    """The files that an index names, and the tensors that each has to have."""
    names = read_configuration(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{path}: has no weight_map of tensors and files: the model is not whole")
    files: dict[Path, set[str] | None] = {}
    for file in sorted(set(names.values())):
        if file != Path(file).name:
            raise UserError(f"{path}: names {file!r}, which is not a file beside it")
        files[path.parent / file] = {name for name, place in names.items() if place == file}
    return files


def _check(path: Path, names: set[str] | None) -> None:
    """Refuse a file that is not whole, or has other tensors than ``names``."""
    import safetensors

    try:
        unfit = unfit_file(path)
        if unfit is not None:
            raise UserError(f"{path}: {unfit}")
        types = _types_in(path)
    except FileNotFoundError:
        raise UserError(f"{path}: is missing: the model is not whole") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: is not a whole safetensors file ({error}); fetch it again") from error
    refuse_quantised_weights(path, types)
    if names is not None and (others := types.keys() ^ names):
        raise UserError(f"{path}: has other tensors than its index says (first: {min(others)}); fetch both again")


def dtypes(weights: Weights) -> set[str]:
    """Names of the types (``F16``) of a part's tensors."""
    prefix = weights.prefix or ""
    types = [item for path in weights.files for item in _types_in(path).items()]
    return {kind for name, kind in types if name.startswith(prefix)}


def describe_keys(info: Mapping[str, Sequence[Any]], buffers: set[str]) -> str | None:
    """What is wrong with the names of a loaded part's weights; None where nothing is.

    info: ``missing_keys``, ``unexpected_keys``, ``mismatched_keys`` and ``error_msgs`` of diffusers or transformers,
    which leave out what the class itself does not need. buffers: of the model, which it computes where they are not
    stored.
    """
    mismatched = sorted(str(key if isinstance(key, str) else key[0]) for key in info.get("mismatched_keys", ()))
    missing = sorted(set(info.get("missing_keys", ())) - set(mismatched))
    unexpected = sorted(set(info.get("unexpected_keys", ())) - buffers)
    prefix = _common_prefix(missing, unexpected)
    if prefix is not None:
        return (
            f"the names of its weights begin with {prefix} ({unexpected[0]}), as of a model that was wrapped or "
            "compiled when it was saved: take that off"
        )
    parts = [
        f"{len(keys)} weights {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (
            ("are missing", missing),
            ("are not the model's", unexpected),
            ("have another shape", mismatched),
        )
        if keys
    ]
    errors = [str(error).splitlines()[0] for error in info.get("error_msgs", ()) if str(error).strip()]
    return "; ".join(parts or errors[:1]) or None


def _common_prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """What the weights that are not the model's have before the names of those that are missing."""
    wanted = set(missing)
    for name in unexpected[:1]:
        dots = [place + 1 for place, letter in enumerate(name) if letter == "."]
        for place in dots:
            prefix = name[:place]
            if all(key.startswith(prefix) and key[place:] in wanted for key in unexpected):
                return prefix
    return None
