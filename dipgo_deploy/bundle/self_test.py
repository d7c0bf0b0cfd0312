"""The test that an engine directory carries: inputs and outputs of a loop, recorded at export, in one safetensors file.

What the loop draws is not in it: it comes from a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pydantic

from dipgo_deploy import documents
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import EXPORT_AGAIN, NUMPY_DTYPES, Manifest, TensorSpec
from dipgo_deploy.bundle.shapes import Sizes
from dipgo_deploy.bundle.stored_tensors import open_tensors, read_tensors
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.validation import one_line

SELF_TEST_NAME = "self_test.safetensors"
SMALL_BYTES = 2**20
"""What an export records without being asked."""
MOST_BYTES = 64 * 2**20
"""What it records at most, and a run reads."""

FINAL, LATENT = "final", "latent"
_DOCUMENT = "self_test"


class Recorded(pydantic.BaseModel):
    """What was recorded, beside the tensors; in the file's own header."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    seed: int = pydantic.Field(description="of the loop's noise")
    guidance_scale: float = pydantic.Field(description="1 without guidance")
    sizes: tuple[int, int, int] = pydantic.Field(description="batch, height and width, the latter of the latent")
    tolerance: float = pydantic.Field(gt=0, description="largest error that passes, of a tensor's largest value")
    reason: str = pydantic.Field(description="why the tolerance is what it is")
    predictions: tuple[int, ...] = pydantic.Field(description="launches whose prediction in the loop is expected")
    alone: tuple[int, ...] = pydantic.Field(
        description="launches of the layout `variants` that are expected by themselves, from recorded caches"
    )
    left_out: tuple[str, ...] = pydantic.Field(description="variants that are not expected by themselves")
    whole: bool = pydantic.Field(
        default=True,
        exclude_if=bool,
        description="whether the loop was recorded to its end; else the predictions are all there is of it",
    )

    @pydantic.field_validator("tolerance", "guidance_scale")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not np.isfinite(value):
            raise ValueError(f"{value} is not finite")
        return value


@dataclass(frozen=True)
class SelfTest:
    """What was recorded with its tensors, by the names of ``tensor_specs``; manifest: of the directory at its sizes."""

    recorded: Recorded
    tensors: Mapping[str, np.ndarray]
    manifest: Manifest


def condition_tensor(name: str) -> str:
    """Name of the recorded values of a condition."""
    return f"condition.{name}"


def prediction_tensor(launch: int) -> str:
    """Name of the expected prediction of a launch in the loop."""
    return f"prediction.{launch}"


def alone_tensor(launch: int, name: str) -> str:
    """Name of an input (its latent, a cache) or an expected output of a launch by itself."""
    return f"launch.{launch}.{name}"


def loop_specs(manifest: Manifest, predictions: tuple[int, ...], *, whole: bool) -> dict[str, TensorSpec]:
    """What is recorded of the loop; manifest: at its sizes."""
    sample = (manifest.batch, *manifest.latent.shape)
    shapes = {**({FINAL: sample} if whole else {}), **{prediction_tensor(launch): sample for launch in predictions}}
    found = {name: TensorSpec(name=name, shape=shape, dtype="float32") for name, shape in shapes.items()}
    for spec in manifest.conditions:
        name = condition_tensor(spec.name)
        found[name] = TensorSpec(name=name, shape=spec.shape, dtype=_kept(spec))
    return found


def alone_specs(manifest: Manifest, launch: int) -> dict[str, TensorSpec]:
    """What is recorded of a launch by itself: its latent, what it reads as its graph takes it, and its outputs."""
    variant = manifest.plan.variants[manifest.plan.launches[launch].variant]
    inputs = {spec.name: spec for spec in variant.graph.inputs}
    sample = (manifest.batch, *manifest.latent.shape)
    specs = [TensorSpec(name=LATENT, shape=sample, dtype="float32")]
    specs += [TensorSpec(name=name, shape=inputs[name].shape, dtype=_kept(inputs[name])) for name in variant.reads]
    specs += [TensorSpec(name=spec.name, shape=spec.shape, dtype="float32") for spec in variant.graph.outputs]
    named = {alone_tensor(launch, spec.name): spec for spec in specs}
    return {name: spec.model_copy(update={"name": name}) for name, spec in named.items()}


def tensor_specs(recorded: Recorded, manifest: Manifest) -> dict[str, TensorSpec]:
    """All tensors of a test by name; manifest: at its sizes."""
    found = loop_specs(manifest, recorded.predictions, whole=recorded.whole)
    for launch in recorded.alone:
        found |= alone_specs(manifest, launch)
    return found


def nbytes(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of tensors."""
    return sum(spec.nbytes for spec in specs.values())


def write_self_test(path: Path, test: SelfTest) -> None:
    """Write the file ``path``."""
    from safetensors.numpy import save

    specs = tensor_specs(test.recorded, test.manifest)
    arrays = {name: np.ascontiguousarray(test.tensors[name], NUMPY_DTYPES[spec.dtype]) for name, spec in specs.items()}
    # Not save_file: what that writes only its owner can read.
    path.write_bytes(save(arrays, {_DOCUMENT: test.recorded.model_dump_json()}))


def self_test_file(manifest: Manifest) -> str:
    """The test of a manifest's schedule, relative to the directory."""
    return (PurePosixPath(manifest.folder) / SELF_TEST_NAME).as_posix()


def has_self_test(manifest: Manifest) -> bool:
    """Whether the engine directory carries a test."""
    return self_test_file(manifest) in manifest.files


def read_self_test(bundle: Bundle) -> SelfTest:
    """The test of an engine directory.

    Raises:
        UserError: it carries none, or one that does not fit its launch list.
    """
    path = bundle.path / self_test_file(bundle.manifest)
    if not has_self_test(bundle.manifest):
        raise UserError(
            f"{bundle.path}: carries no self-test (it is older, too large for one, or was exported without); export it "
            "again with --self-test, or compare it with the model: dipgo-compare"
        )
    file = open_tensors(path)
    try:
        recorded = Recorded.model_validate(documents.json_object(file.metadata.get(_DOCUMENT, "")))
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {one_line(error)}; {EXPORT_AGAIN}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}; {EXPORT_AGAIN}") from None
    manifest = bundle.manifest.at(Sizes(*recorded.sizes))
    _check_launches(path, recorded, manifest)
    specs = tensor_specs(recorded, manifest)
    if nbytes(specs) > MOST_BYTES:
        raise UserError(f"{path}: takes {nbytes(specs)} bytes, more than {MOST_BYTES}; {EXPORT_AGAIN}")
    return SelfTest(recorded, read_tensors(file, specs, "the launches have"), manifest)


def _check_launches(path: Path, recorded: Recorded, manifest: Manifest) -> None:
    plan = manifest.plan
    for launch in (*recorded.predictions, *recorded.alone):
        if not 0 <= launch < len(plan.launches):
            raise UserError(f"{path}: there is no launch {launch}; {EXPORT_AGAIN}")
    if not recorded.whole and not recorded.predictions:
        raise UserError(f"{path}: nothing is recorded of the loop; {EXPORT_AGAIN}")
    for launch in recorded.predictions:
        if plan.launches[launch].slot is None:
            raise UserError(f"{path}: launch {launch} makes no prediction; {EXPORT_AGAIN}")
    if recorded.alone and not plan.one_launch_each:
        raise UserError(f"{path}: parts of evaluations are not launched by themselves; {EXPORT_AGAIN}")


def _kept(spec: TensorSpec) -> Literal["float32", "float16", "int64"]:
    """numpy has no bfloat16 that could be written."""
    return "float32" if spec.dtype == "bfloat16" else spec.dtype
