"""A model repository for NVIDIA Triton: what it has to be told of an engine directory, and its files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dipgo_deploy import arguments
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import MANIFEST_NAME, Manifest
from dipgo_deploy.bundle.staging import staged_directory
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.given_pictures import picture_conditions
from dipgo_deploy.runtime.requests import class_condition, text_conditions
from dipgo_deploy.serve.engine import check_served
from dipgo_deploy.serve.settings import Drawing

VERSION = "1"
"""Folder of the model's only version."""
COPY = "engine"
"""Beside model.py, a copy of the engine directory."""
IMAGE, SEED = "image", "used_seed"

_MODEL = '''"""Draws with an engine directory; made by dipgo-triton. All that it does is in the package dipgo_deploy."""

from pathlib import Path

from dipgo_deploy.serve.triton_model import Model


class TritonPythonModel(Model):
    """What Triton looks for."""

    folder = Path(__file__).parent
'''
# Where a GPU is used each instance has one of its own.
_KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU"}

DataType = Literal["STRING", "INT64", "UINT64", "INT32", "FP32", "UINT8"]


@dataclass(frozen=True)
class Tensor:
    """An input or output, of one picture. dims: -1 where open."""

    name: str
    dtype: DataType
    dims: tuple[int, ...] = (1,)
    optional: bool = False


def inputs_of(manifests: Sequence[Manifest]) -> list[Tensor]:
    """What a picture of a directory is told, by the fields of a request. manifests: of its schedules."""
    first = manifests[0]
    several = len(first.model.denoisers) > 1
    distilled = any(spec.source == "guidance" for spec in first.conditions)
    found = []
    if text_conditions(first):
        found.append(Tensor("prompt", "STRING"))
        found += [Tensor("negative_prompt", "STRING", optional=True)] if first.guidance else []
    found += [Tensor("class_label", "INT64")] if class_condition(first) is not None else []
    found.append(Tensor("seed", "UINT64", optional=True))
    found += [Tensor("guidance_scale", "FP32", optional=True)] if first.guidance or distilled else []
    found += [Tensor("guidance_scale_2", "FP32", optional=True)] if first.guidance and several else []
    found += [Tensor("schedule", "STRING", optional=True)] if len(manifests) > 1 else []
    sized = [Tensor("height", "INT32", optional=True), Tensor("width", "INT32", optional=True)]
    return found + (sized if first.sizes is not None else [])


def outputs_of(manifests: Sequence[Manifest]) -> list[Tensor]:
    """What a picture of a directory comes with: itself (H, W, 3), and the seed that it was drawn with."""
    decoder = manifests[0].components.vae_decoder
    assert decoder is not None  # check_served
    size = (-1, -1) if manifests[0].sizes is not None else decoder.outputs[0].shape[1:3]
    return [Tensor(IMAGE, "UINT8", (*size, 3)), Tensor(SEED, "UINT64")]


def config_text(
    name: str,
    manifests: Sequence[Manifest],
    engine_dir: str,
    drawing: Drawing | None = None,
) -> str:
    """config.pbtxt.

    Args:
        name: of the model.
        manifests: of the directory's schedules.
        engine_dir: its path, from the folder of model.py where it is relative.
        drawing: how requests are drawn; None: as is usual.
    """
    drawing = drawing or Drawing()
    threads = "" if drawing.threads is None else str(drawing.threads)
    settings = {"engine_dir": engine_dir, "backend": drawing.backend, "threads": threads}
    lines = [
        f"name: {json.dumps(name, ensure_ascii=False)}",
        'backend: "python"',
        f"max_batch_size: {manifests[0].batch}",
        *(line for tensor in inputs_of(manifests) for line in _tensor("input", tensor)),
        *(line for tensor in outputs_of(manifests) for line in _tensor("output", tensor)),
        "dynamic_batching {",
        f"  max_queue_delay_microseconds: {round(drawing.window * 1e6)}",
        f"  default_queue_policy {{ max_queue_size: {drawing.max_queue} }}",
        "}",
        f"instance_group [ {{ kind: {_KINDS.get(drawing.backend, 'KIND_GPU')} count: 1 }} ]",
    ]
    for key, value in settings.items():
        text = json.dumps(value, ensure_ascii=False)
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: {text} }} }}')
    return "\n".join(lines) + "\n"


def _tensor(kind: str, tensor: Tensor) -> list[str]:
    dims = ", ".join(map(str, tensor.dims))
    optional = " optional: true" if tensor.optional else ""
    return [f'{kind} [ {{ name: "{tensor.name}" data_type: TYPE_{tensor.dtype} dims: [ {dims} ]{optional} }} ]']


def check_repository(repository: str | os.PathLike[str], name: str) -> Path:
    """The folder that a model gets. Raises UserError where there cannot be one of that name."""
    folder = arguments.path("repository", repository)
    if not name or len(name) > 100 or not name.isprintable() or "/" in name or name.startswith("."):
        raise UserError(f"--name {name}: cannot be the name of a model; give another")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the folder of a model repository")
    target = folder / name
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists; remove it, or give another --name")
    return target


def write_repository(
    repository: str | os.PathLike[str],
    engine_dir: str | os.PathLike[str],
    *,
    name: str | None = None,
    copy: bool = False,
    drawing: Drawing | None = None,
) -> Path:
    """Put an engine directory into a model repository; returns the model's folder, which appears whole or not at all.

    Args:
        repository: its folder, which is made where there is none.
        engine_dir: the engine directory.
        name: of the model; None: the directory's.
        copy: put a copy of it beside the model, so that the repository can be moved; else its path is written down.
        drawing: see ``config_text``.

    Raises:
        UserError: the directory is wrong or gives no pictures, or the repository has a model of that name.
    """
    path = arguments.path("engine_dir", engine_dir).resolve()
    name = path.name if name is None else name
    target = check_repository(repository, name)
    bundle = Bundle.open(path)
    manifests = [each.manifest for each in bundle.with_each()]
    for manifest in manifests:
        check_served(path, manifest)
        if manifest.sampler.strength is not None or picture_conditions(manifest):
            raise UserError(f"{path}: draws after pictures, which Triton's model does not take; use dipgo-serve")
    text = config_text(name, manifests, COPY if copy else str(path), drawing)
    with staged_directory(target) as folder:
        (folder / VERSION).mkdir()
        (folder / "config.pbtxt").write_text(text, encoding="utf-8")
        (folder / VERSION / "model.py").write_text(_MODEL, encoding="utf-8")
        if copy:
            _copy(path, folder / VERSION / COPY)
    return target


def _copy(source: Path, target: Path) -> None:
    """All of an engine directory, the manifest last, as what is not whole has none."""
    try:
        shutil.copytree(source, target, ignore=lambda place, names: [MANIFEST_NAME] if Path(place) == source else [])
        shutil.copy2(source / MANIFEST_NAME, target / MANIFEST_NAME)
    except (OSError, shutil.Error) as error:
        raise UserError(f"{source}: cannot be copied to the repository ({error})") from None
