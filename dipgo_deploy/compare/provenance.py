"""What a comparison was of and made with: both models, versions, and the tolerances with where they come from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dipgo_deploy._version import __version__
from dipgo_deploy.bundle.weights import WEIGHTS_NAME
from dipgo_deploy.compare.metrics import WHOLE
from dipgo_deploy.models.family import tolerance_reason

if TYPE_CHECKING:
    import torch

    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.bundle.manifest import Manifest
    from dipgo_deploy.compare.metrics import Tolerance
    from dipgo_deploy.models.family import ModelFamily
    from dipgo_deploy.reference.source import Source

_PACKAGES = ("numpy", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "polygraphy")
_ENGINES = ("openvino", "tensorrt", "tensorrt-rtx")


def models(bundle: Bundle, source: Source) -> dict[str, Any]:
    """What tells the models of both sides apart.

    ``engine_dir``: the seal of the manifest, and the sha256 of each file of weights. ``model``: that of the
    configuration, and of the denoiser's parameters (see ``parameters_hash``), which reads all of them.
    """
    return {
        "engine_dir": engine_facts(bundle),
        "model": {
            "name": source.name,
            "class_name": source.family.class_name,
            "config_hash": source.config_hash,
            "weights": parameters_hash(source.denoiser.state_dict()),
        },
    }


def engine_facts(bundle: Bundle) -> dict[str, Any]:
    """What tells an engine directory apart."""
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "class_name": manifest.model.class_name,
        "config_hash": manifest.model.config_hash,
        "seal": manifest.seal or None,
        "weights": {name: sha for name, sha in manifest.files.items() if name.endswith(WEIGHTS_NAME)},
    }


def parameters_hash(parameters: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of parameters, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = parameters[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def versions(bundle: Bundle) -> dict[str, dict[str, str]]:
    """Of what made the engine directory, and of what compares it."""
    here = {"dipgo_deploy": __version__, "python": platform.python_version()}
    for package in (*_PACKAGES, *_ENGINES):
        try:
            here[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"engine_dir": {"created_by": bundle.manifest.created_by, **bundle.manifest.tools}, "here": here}


def side_tolerances(
    family: ModelFamily, manifests: Sequence[Manifest], tolerance: Tolerance, *, asked: bool
) -> list[dict[str, Any]]:
    """The tolerance of two sides, of these graphs; asked: it was given, and is not the family's."""
    loosest = max(manifests, key=lambda manifest: family.tolerance(manifest.dtype, manifest.quantized))
    reason = "asked for" if asked else _may_differ(family, loosest)
    return [
        {
            "of": "loop and results",
            "relative": tolerance.relative,
            "absolute": tolerance.absolute,
            "reason": reason + ("; the absolute one was asked for" if tolerance.absolute else ""),
        }
    ]


def tolerances(source: Source, manifest: Manifest, tolerance: Tolerance, *, asked: bool) -> list[dict[str, Any]]:
    """Each tolerance, what it is for, and why it is that; asked: it was given, and is not the family's."""
    family = source.family
    absolute = "" if not tolerance.absolute else "; the absolute one was asked for"
    why = "asked for" if asked else _may_differ(family, manifest)
    if asked or manifest.quantized is None:
        of = {"graphs, loop and pictures": (why, tolerance.relative)}
    else:
        added = "the errors of all launches in fewer bits add up: beyond this they are certainly broken"
        of = {"graphs": (why, tolerance.relative), "latents and pictures": (added, WHOLE)}
    beside = tolerance.relative if asked else family.tolerance(manifest.dtype)
    if beside == tolerance.relative:
        of = {f"conditions, VAE, {name}": why for name, why in of.items()}
    else:
        plain = f"what {family.class_name} in {manifest.dtype} may differ from the model in float32"
        of["conditions, VAE"] = (plain, beside)
    copies = "they are copies of the model's, rounded to the type of the graphs where that is another"
    if manifest.quantized is not None:
        copies += "; those in fewer bits are the nearest numbers"
    return [
        *(
            {"of": name, "relative": relative, "absolute": tolerance.absolute, "reason": reason + absolute}
            for name, (reason, relative) in of.items()
        ),
        {"of": "weights and tokens", "relative": 0.0, "absolute": 0.0, "reason": copies},
    ]


def _may_differ(family: ModelFamily, manifest: Manifest) -> str:
    if family.tolerance(manifest.dtype, manifest.quantized) > family.tolerance(manifest.dtype):
        return f"{manifest.quantized}: {tolerance_reason(manifest.dtype, manifest.quantized)}"
    return f"what {family.class_name} in {manifest.dtype} may differ from the model in float32"
